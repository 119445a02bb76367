//! The configuration that the delegate is given, byte for byte what flannel's plugin generates from the same (flannel:
//! cni-plugin/flannel_linux.go): Go's `encoding/json`, which sorts the keys of maps.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::{error::Error, request::Network, subnet_file::SubnetFile};

/// The delegate where the network names none.
const DELEGATE: &str = "bridge";
/// The address management where the network names none.
const IPAM: &str = "host-local";
/// A route's fields besides `dst`, in the order of cni's `types.Route`.
const ROUTE_FIELDS: [&str; 6] = ["gw", "mtu", "advmss", "priority", "table", "scope"];

/// A delegate's configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct DelegateConf(Map<String, Value>);

impl DelegateConf {
    /// From the network and this host's subnet.
    ///
    /// # Errors
    /// [`Error::Network`] and [`Error::DelegateField`].
    pub fn generate(network: &Network, subnet: &SubnetFile) -> Result<Self, Error> {
        let mut conf = network.delegate.clone().unwrap_or_default();
        if conf.get("type").is_some_and(|value| !value.is_string()) {
            let message = "'delegate' dictionary, if present, must have (string) 'type' field";
            return Err(Error::Network(message.to_owned()));
        }
        for key in ["name", "ipam"] {
            if let Some(value) = conf.get(key) {
                return Err(Error::DelegateField { key, value: value.clone() });
            }
        }
        if let Some(runtime) = &network.runtime_config {
            conf.insert("runtimeConfig".to_owned(), runtime.clone().into());
        }
        conf.insert("name".to_owned(), network.name.clone().into());
        conf.entry("type").or_insert_with(|| DELEGATE.into());
        // One of the two masquerades.
        conf.entry("ipMasq").or_insert_with(|| (!subnet.ip_masq).into());
        conf.entry("mtu").or_insert_with(|| subnet.mtu.into());
        if conf.get("type").is_some_and(|value| value == "bridge") {
            conf.entry("isGateway").or_insert_with(|| true.into());
        }
        if !network.cni_version.is_empty() {
            conf.insert("cniVersion".to_owned(), network.cni_version.clone().into());
        }
        let mut ipam = network.ipam.clone().unwrap_or_default();
        let mut routes = given_routes(&ipam)?;
        routes.extend(subnet.networks.iter().map(|network| json!({ "dst": network.to_string() })));
        ipam.entry("type").or_insert_with(|| IPAM.into());
        let ranges: Vec<_> = subnet.subnets.iter().map(|subnet| json!([{ "subnet": subnet.to_string() }])).collect();
        ipam.insert("ranges".to_owned(), ranges.into());
        ipam.insert("routes".to_owned(), Value::Null);
        conf.insert("ipam".to_owned(), ipam.into());

        let mut conf = Value::Object(conf);
        conf.sort_all_objects();
        // Go writes a route's fields in an order of their own.
        conf["ipam"]["routes"] = routes.into();
        Ok(match conf {
            Value::Object(conf) => Self(conf),
            _ => Self(Map::new()),
        })
    }

    /// One that was kept.
    ///
    /// # Errors
    /// Where it is none: no JSON, or without a plugin's name.
    pub fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let conf = Self(serde_json::from_slice(bytes)?);
        match conf.plugin() {
            "" => Err(serde::de::Error::missing_field("type")),
            _ => Ok(conf),
        }
    }

    /// Its bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut text = Value::Object(self.0.clone()).to_string();
        // In JSON these are found in strings only, and Go escapes them there.
        for character in ['&', '<', '>', '\u{2028}', '\u{2029}'] {
            if text.contains(character) {
                text = text.replace(character, &format!("\\u{:04x}", u32::from(character)));
            }
        }
        text.into_bytes()
    }

    /// The delegate's name.
    pub fn plugin(&self) -> &str {
        self.0.get("type").and_then(Value::as_str).unwrap_or_default()
    }

    /// The name of its network.
    pub fn network(&self) -> &str {
        self.0.get("name").and_then(Value::as_str).unwrap_or_default()
    }

    /// The subnets that it has addresses from, in words.
    pub fn subnets(&self) -> Vec<&str> {
        let ranges = self.0.get("ipam").and_then(|ipam| ipam.get("ranges")?.as_array());
        ranges.into_iter().flatten().filter_map(|range| range.get(0)?.get("subnet")?.as_str()).collect()
    }

    /// With one more key, which only this run of the delegate is given.
    #[must_use]
    pub fn with(&self, key: &str, value: Value) -> Self {
        let mut conf = self.0.clone();
        conf.insert(key.to_owned(), value);
        Self(conf)
    }
}

fn given_routes(ipam: &Map<String, Value>) -> Result<Vec<Value>, Error> {
    let routes = match ipam.get("routes") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(routes) => routes,
    };
    let bad = |what: &Value| Error::Network(format!("failed to read IPAM routes: failed to parse ipam.routes: {what}"));
    let routes = routes.as_array().ok_or_else(|| bad(routes))?;
    routes.iter().map(|given| route(given).ok_or_else(|| bad(given))).collect()
}

fn route(given: &Value) -> Option<Value> {
    let destination: IpNet = given.get("dst")?.as_str()?.parse().ok()?;
    let mut route = json!({ "dst": destination.to_string() });
    for field in ROUTE_FIELDS {
        let value = match given.get(field) {
            None | Some(Value::Null) => continue,
            Some(value) => value,
        };
        route[field] = match field {
            "gw" => value.as_str()?.parse::<IpAddr>().ok()?.to_string().into(),
            _ => value.as_i64()?.into(),
        };
    }
    Some(route)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const ENV: &str =
        "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n";
    const DUAL: &str = "FLANNEL_NETWORK=10.1.0.0/16,192.168.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\n\
                        FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00:0:0:1::1/64\nFLANNEL_MTU=1472\n\
                        FLANNEL_IPMASQ=false\n";

    fn generate(network: &str, env: &str) -> Result<String, Error> {
        let network = Network::parse(network.as_bytes())?;
        let subnet = SubnetFile::parse(Path::new("subnet.env"), env)?;
        let conf = DelegateConf::generate(&network, &subnet)?;
        Ok(String::from_utf8(conf.to_bytes()).expect("UTF-8"))
    }

    /// By hand from what flannel's code does with the same; the first is what its users have.
    #[test]
    fn flannels_bytes() {
        for (network, env, golden) in [
            (
                r#"{"name":"cbr0","cniVersion":"0.3.1","type":"flannel","delegate":{"hairpinMode":true,"isDefaultGateway":true}}"#,
                ENV,
                r#"{"cniVersion":"0.3.1","hairpinMode":true,"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}],"type":"host-local"},"isDefaultGateway":true,"isGateway":true,"mtu":1472,"name":"cbr0","type":"bridge"}"#,
            ),
            (
                r#"{"name":"n","type":"flannel","ipam":{"type":"x","subnet":"1.2.3.0/24","routes":[{"gw":"10.0.0.1","dst":"0.0.0.0/0","metric":1}],"ranges":[]}}"#,
                DUAL,
                r#"{"ipMasq":true,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}],[{"subnet":"fc00:0:0:1::/64"}]],"routes":[{"dst":"0.0.0.0/0","gw":"10.0.0.1"},{"dst":"10.1.0.0/16"},{"dst":"192.168.0.0/16"},{"dst":"fc00::/48"}],"subnet":"1.2.3.0/24","type":"x"},"isGateway":true,"mtu":1472,"name":"n","type":"bridge"}"#,
            ),
            (
                r#"{"name":"n","cniVersion":"1.0.0","runtimeConfig":{"portMappings":[{"hostPort":80,"containerPort":8080}]},"delegate":{"type":"macvlan","mtu":1400,"ipMasq":true,"master":"a&<b>"}}"#,
                ENV,
                r#"{"cniVersion":"1.0.0","ipMasq":true,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}],"type":"host-local"},"master":"a\u0026\u003cb\u003e","mtu":1400,"name":"n","runtimeConfig":{"portMappings":[{"containerPort":8080,"hostPort":80}]},"type":"macvlan"}"#,
            ),
        ] {
            assert_eq!(generate(network, env).expect("valid"), golden);
        }
    }

    #[test]
    fn what_flannel_forbids() {
        for (delegate, code, message) in [
            (r#"{"type":7}"#, 7, "'delegate' dictionary, if present, must have (string) 'type' field"),
            (r#"{"name":"x"}"#, 2, "'delegate' dictionary must not have 'name' field, it'll be set by flannel"),
            (r#"{"ipam":{}}"#, 2, "'delegate' dictionary must not have 'ipam' field, it'll be set by flannel"),
        ] {
            let error = generate(&format!(r#"{{"name":"n","delegate":{delegate}}}"#), ENV).expect_err("refused");
            assert_eq!((error.code(), error.to_string().as_str()), (code, message));
        }
        let error = generate(r#"{"name":"n","ipam":{"routes":[{"dst":"10.0.0.0"}]}}"#, ENV).expect_err("refused");
        assert_eq!(error.code(), 7);
    }

    #[test]
    fn what_was_kept_is_read_back() {
        let text = generate(r#"{"name":"n"}"#, DUAL).expect("valid");
        let conf = DelegateConf::parse(text.as_bytes()).expect("parsed");
        assert_eq!(conf.to_bytes(), text.as_bytes());
        assert_eq!((conf.plugin(), conf.network()), ("bridge", "n"));
        assert_eq!(conf.subnets(), ["10.1.17.0/24", "fc00:0:0:1::/64"]);
        for damaged in ["", "{", "[]", "{}", r#"{"type":7}"#] {
            assert!(DelegateConf::parse(damaged.as_bytes()).is_err(), "{damaged}");
        }
    }
}
