//! `flannel-agent config`: what the agent goes by, and what a network config means.

use std::{fs, io::Read as _, path::Path};

use serde_json::{Value, json};

use super::{
    OperatorError,
    asked::Asked,
    rows,
    secrets::{HIDDEN, Secrets, hide},
};
use crate::{
    cli::{Cli, Origin, Output, Setting},
    config::{BackendConfig, NetworkConfig, unknown_keys},
    escape,
    registry::StoreKind,
    status::API_VERSION,
};

/// Read beside the flags, where leases are from Kubernetes.
const VARIABLES: [&str; 3] = ["NODE_NAME", "POD_NAME", "POD_NAMESPACE"];

/// Prints each flag of the daemon with the value that counts, and the network config of the store.
///
/// # Errors
/// None but of writing.
pub async fn print(cli: &Cli, has_origin: bool, output: Output) -> Result<(), OperatorError> {
    let secrets = Secrets::of(cli, std::env::vars_os());
    let mut settings = cli.settings();
    for setting in &mut settings {
        setting.value = match setting.flag.as_str() {
            "--etcd-password" if !setting.value.is_empty() => HIDDEN.to_owned(),
            _ => secrets.hide(&setting.value),
        };
    }
    settings.extend(VARIABLES.iter().filter_map(|name| {
        let value = std::env::var(name).ok().filter(|value| !value.is_empty())?;
        Some(Setting { flag: String::new(), variable: (*name).to_owned(), value, origin: Origin::Variable })
    }));
    let asked = Asked::ask(cli).await;
    let problem = asked.config.as_ref().err().map(|error| secrets.hide(error));
    match output {
        Output::Table => {
            print!("{}", table(&settings, has_origin));
            let words = match &problem {
                Some(problem) => vec![["problem".to_owned(), problem.clone()]],
                None => meaning(&asked),
            };
            let heading = ["network config".to_owned(), asked.place.clone()];
            print!("\n{}", rows(std::iter::once(heading).chain(words).map(escaped)));
        }
        Output::Json => {
            let text = (!asked.text.is_empty()).then(|| hide(&asked.text));
            let document = text.map(|text| serde_json::from_str(&text).unwrap_or(Value::String(text)));
            println!(
                "{:#}",
                json!({
                    "apiVersion": API_VERSION,
                    "settings": settings,
                    "notices": cli.notices,
                    "networkConfig": { "place": asked.place, "config": document, "problem": problem },
                })
            );
        }
    }
    Ok(())
}

fn table(settings: &[Setting], has_origin: bool) -> String {
    let line = |Setting { flag, variable, value, origin }: &Setting| {
        let name = if flag.is_empty() { variable } else { flag };
        let from = match origin {
            _ if !has_origin => String::new(),
            Origin::Variable => format!("variable {variable}"),
            origin => origin.label().to_owned(),
        };
        [name.clone(), if value.is_empty() { "-".to_owned() } else { value.clone() }, from]
            .map(|text| escaped_text(&text))
    };
    rows(settings.iter().map(line))
}

fn escaped_text(text: &str) -> String {
    escape::control_characters(text).into_owned()
}

fn escaped(row: [String; 2]) -> [String; 2] {
    row.map(|text| escaped_text(&text))
}

/// Says what a network config means: that of a file, or of the store.
///
/// # Errors
/// [`OperatorError::NoConfig`] where it can't be read, [`OperatorError::Config`] where the agent would refuse it.
pub async fn validate(cli: &Cli, file: Option<&Path>) -> Result<(), OperatorError> {
    let (place, text, is_assigned) = match file {
        Some(file) => {
            let place =
                if file == Path::new("-") { "the standard input".to_owned() } else { file.display().to_string() };
            let text = read(file).map_err(|source| OperatorError::NoConfig { place: place.clone(), source })?;
            match of_config_map(&text) {
                Some(inner) => (place, inner, true),
                None => (place, text, cli.is_of_kubernetes()),
            }
        }
        None => {
            let asked = Asked::ask(cli).await;
            asked.config.map_err(OperatorError::Asked)?;
            (asked.place, asked.text, matches!(asked.kind, StoreKind::Kubernetes))
        }
    };
    let parse = if is_assigned { NetworkConfig::parse_assigned } else { NetworkConfig::parse };
    let config =
        parse(&text).map_err(|source| OperatorError::Config { place: place.clone(), source: Box::new(source) })?;
    let lines = words(&config, is_assigned).into_iter().chain(warnings(&text));
    print!("{}", rows(std::iter::once(["config".to_owned(), place]).chain(lines).map(escaped)));
    Ok(())
}

fn read(file: &Path) -> std::io::Result<String> {
    if file != Path::new("-") {
        return fs::read_to_string(file);
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    Ok(text)
}

/// The network config of a ConfigMap, as `kubectl get configmap -o json` prints it.
fn of_config_map(text: &str) -> Option<String> {
    let document: Value = serde_json::from_str(text).ok()?;
    Some(document.get("data")?.get("net-conf.json")?.as_str()?.to_owned())
}

fn meaning(asked: &Asked) -> Vec<[String; 2]> {
    let Ok(config) = &asked.config else { return Vec::new() };
    let is_assigned = matches!(asked.kind, StoreKind::Kubernetes);
    words(config, is_assigned).into_iter().chain(warnings(&asked.text)).collect()
}

fn warnings(text: &str) -> impl Iterator<Item = [String; 2]> + use<> {
    unknown_keys(text).into_iter().map(|remark| ["warning".to_owned(), remark])
}

/// What a config means.
fn words(config: &NetworkConfig, is_assigned: bool) -> Vec<[String; 2]> {
    let NetworkConfig { network, subnet_len, subnet_min, subnet_max, enable_nftables, backend, .. } = config;
    let subnets = match is_assigned {
        true => "the podCIDRs of the nodes; SubnetLen, SubnetMin and SubnetMax have no effect".to_owned(),
        false => {
            let step = 1_u64 << (32 - u32::from(*subnet_len));
            let span = u64::from(subnet_max.to_bits()).saturating_sub(subnet_min.to_bits().into());
            format!("{subnet_min}/{subnet_len} to {subnet_max}/{subnet_len}: {} hosts", span / step + 1)
        }
    };
    let (kind, settings, mtu) = match backend {
        BackendConfig::Vxlan(vxlan) => {
            let direct = if vxlan.direct_routing { ", hosts on the same link without a tunnel" } else { "" };
            let learning = if vxlan.learning { ", learning" } else { "" };
            let mtu = match vxlan.mtu {
                Some(mtu) => {
                    format!("{}, or less where the external interface carries less than {mtu} bytes", mtu - 50)
                }
                None => "the external interface's less 50".to_owned(),
            };
            ("vxlan", format!("VNI {}, UDP port {}{direct}{learning}", vxlan.vni, vxlan.port), mtu)
        }
        BackendConfig::HostGw(host_gw) => {
            let routes =
                if host_gw.kernel_routes { "a route of the kernel's for each host" } else { "one route for all hosts" };
            ("host-gw", format!("all hosts on one link, {routes}"), "the external interface's".to_owned())
        }
        BackendConfig::Udp(udp) => {
            ("udp", format!("in user space, UDP port {}", udp.port), "the external interface's less 28".to_owned())
        }
        BackendConfig::Alloc(_) => {
            ("alloc", "leases only, nothing is carried".to_owned(), "the external interface's".to_owned())
        }
    };
    let rules = match enable_nftables {
        None => "nftables where the host has nft, else iptables",
        Some(true) => "nftables",
        Some(false) => "iptables",
    };
    [
        ("network", network.to_string()),
        ("subnets", subnets),
        ("backend", format!("{kind}: {settings}")),
        ("MTU of pods", mtu),
        ("packet rules", rules.to_owned()),
    ]
    .map(|(name, words)| [name.to_owned(), words])
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(json: &str, is_assigned: bool) -> String {
        let config = if is_assigned { NetworkConfig::parse_assigned(json) } else { NetworkConfig::parse(json) };
        words(&config.unwrap(), is_assigned).into_iter().map(|row| row.join(": ") + "\n").collect()
    }

    #[test]
    fn a_config_is_said_in_words() {
        let vxlan = said(
            r#"{"Network": "10.5.0.0/16", "SubnetMin": "10.5.8.0", "SubnetMax": "10.5.9.0", "Backend": {"Type": "vxlan", "MTU": 1400}}"#,
            false,
        );
        for line in [
            "network: 10.5.0.0/16\n",
            "subnets: 10.5.8.0/24 to 10.5.9.0/24: 2 hosts\n",
            "backend: vxlan: VNI 1, UDP port 8472\n",
            "MTU of pods: 1350, or less where",
        ] {
            assert!(vxlan.contains(line), "{vxlan}");
        }
        let plain = said(r#"{"Network": "10.5.0.0/16", "EnableNFTables": true, "Backend": {"Type": "host-gw"}}"#, true);
        assert!(
            plain.contains("subnets: the podCIDRs of the nodes") && plain.contains("packet rules: nftables"),
            "{plain}"
        );
        assert!(said(r#"{"Network": "10.5.0.0/16"}"#, false).contains("10.5.1.0/24 to 10.5.255.0/24: 255 hosts"));
        let map = r#"{"kind": "ConfigMap", "data": {"cni-conf.json": "{}", "net-conf.json": "{\"Network\": \"10.5.0.0/16\"}"}}"#;
        assert_eq!(of_config_map(map).as_deref(), Some(r#"{"Network": "10.5.0.0/16"}"#));
        assert_eq!(of_config_map(r#"{"Network": "10.5.0.0/16"}"#), None);
    }
}
