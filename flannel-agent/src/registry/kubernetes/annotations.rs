//! The annotations by which nodes know of each other, byte for byte flannel's (flannel: pkg/subnet/kube/annotations.go,
//! kube.go).

use std::{collections::HashMap, net::Ipv4Addr};

use regex::Regex;
use serde_json::{Value, json};

use crate::{
    go_values,
    lease::{LeaseAttributes, MacAddress, VxlanData, beginning},
};

/// What flannel writes for a node that it serves; anything else is none of its nodes.
const MANAGED: &str = "true";

/// No annotation can begin with it. The texts are flannel's.
#[derive(Debug, thiserror::Error)]
pub enum InvalidPrefix {
    /// More than one slash.
    #[error("subnet/kube: prefix can contain at most single slash")]
    Slashes,
    /// Not of the form that Kubernetes asks for.
    #[error("subnet/kube: prefix must be in a format: fqdn/[0-9a-z-_]*")]
    Form,
}

/// The annotations' names.
#[derive(Clone, Debug)]
pub(super) struct Names {
    prefix: String,
}

impl Names {
    /// Completes a prefix as flannel does.
    pub(super) fn new(prefix: &str) -> Result<Self, InvalidPrefix> {
        let mut prefix = prefix.to_owned();
        match prefix.matches('/').count() {
            0 => prefix.push('/'),
            1 => {}
            _ => return Err(InvalidPrefix::Slashes),
        }
        if !prefix.ends_with(['/', '-']) {
            prefix.push('-');
        }
        // As flannel's: nothing holds its beginning to that of the text.
        let form = Regex::new(r"(?:[a-z0-9_-]+\.)+[a-z0-9_-]+/(?:[a-z0-9_-]+-)?$");
        if form.is_ok_and(|form| form.is_match(&prefix)) { Ok(Self { prefix }) } else { Err(InvalidPrefix::Form) }
    }

    /// What all of them begin with.
    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    fn name(&self, suffix: &str) -> String {
        format!("{}{suffix}", self.prefix)
    }

    /// Those of a node that concern flannel.
    pub(super) fn read(&self, mut annotations: HashMap<String, String>) -> Announcement {
        let mut take = |suffix: &str| annotations.remove(&self.name(suffix)).filter(|value| !value.is_empty());
        Announcement {
            is_managed: take("kube-subnet-manager").is_some_and(|value| value == MANAGED),
            backend_type: take("backend-type"),
            backend_data: take("backend-data"),
            backend_v6_data: take("backend-v6-data"),
            public_ip: take("public-ip"),
            public_ipv6: take("public-ipv6"),
            public_ip_overwrite: take("public-ip-overwrite"),
            node_public_ip: take("node-public-ip"),
        }
    }

    /// What makes a node announce these attributes, as a strategic merge patch. [`None`] where it does already: an annotation that
    /// is empty is none. Those of IPv6 are nobody's here, and stay.
    pub(super) fn patch(&self, now: &Announcement, attributes: &LeaseAttributes) -> Option<Value> {
        let data = attributes.backend_data.as_ref().unwrap_or(&Value::Null).to_string();
        let managed = now.is_managed.then(|| MANAGED.to_owned());
        let annotations: serde_json::Map<_, _> = [
            ("backend-data", &now.backend_data, data),
            ("backend-type", &now.backend_type, attributes.backend_type.clone()),
            ("kube-subnet-manager", &managed, MANAGED.to_owned()),
            ("public-ip", &now.public_ip, attributes.public_ip.to_string()),
        ]
        .into_iter()
        .filter(|(_, before, wanted)| before.as_deref().unwrap_or_default() != wanted.as_str())
        .map(|(suffix, _, wanted)| (self.name(suffix), wanted.into()))
        .collect();
        (!annotations.is_empty()).then(|| json!({ "metadata": { "annotations": annotations } }))
    }
}

/// What a node announces. An annotation that is empty is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Announcement {
    /// Whether it is one of flannel's nodes.
    pub(super) is_managed: bool,
    backend_type: Option<String>,
    backend_data: Option<String>,
    backend_v6_data: Option<String>,
    public_ip: Option<String>,
    public_ipv6: Option<String>,
    public_ip_overwrite: Option<String>,
    node_public_ip: Option<String>,
}

impl Announcement {
    /// As the attributes of a lease; or why they are none.
    pub(super) fn attributes(&self) -> Result<LeaseAttributes, String> {
        let json = |name: &str, text: &Option<String>| {
            let parsed = text.as_deref().map(serde_json::from_str::<Value>).transpose();
            parsed.map_err(|error| format!("its annotation {name} is no JSON: {error}"))
        };
        let public_ip = self.public_ip.as_deref().ok_or("it has no annotation public-ip")?;
        let public_ip = go_values::ipv4(public_ip)
            .map_err(|_| format!("its annotation public-ip {:?} is no IPv4 address", beginning(public_ip)))?;
        if self.backend_type.as_deref() == Some("vxlan") && self.backend_data.is_none() {
            return Err("it has no annotation backend-data".to_owned());
        }
        Ok(LeaseAttributes {
            public_ip,
            // Kept for who reads it; nothing here depends on it.
            public_ipv6: self.public_ipv6.as_deref().and_then(|text| text.parse().ok()),
            backend_type: self.backend_type.clone().unwrap_or_default(),
            backend_data: json("backend-data", &self.backend_data)?,
            backend_v6_data: json("backend-v6-data", &self.backend_v6_data).ok().flatten(),
        })
    }

    /// The VTEP address that it announces.
    pub(super) fn public_ip(&self) -> Option<Ipv4Addr> {
        go_values::ipv4(self.public_ip.as_deref()?).ok()
    }

    /// The MAC that it announces, whatever else it says.
    pub(super) fn vtep_mac(&self) -> Option<MacAddress> {
        serde_json::from_str::<VxlanData>(self.backend_data.as_deref()?).ok().map(|data| data.vtep_mac)
    }

    /// The host of this overlay that it announces, where that is another than the one of these attributes.
    pub(super) fn rival(&self, own: &LeaseAttributes) -> Option<(Ipv4Addr, MacAddress)> {
        let announced = self.attributes().ok().filter(|_| self.is_managed)?;
        let (theirs, ours) = (announced.vxlan_data().ok()?, own.vxlan_data().ok()?);
        let is_rival =
            theirs.vni == ours.vni && (announced.public_ip, theirs.vtep_mac) != (own.public_ip, ours.vtep_mac);
        is_rival.then_some((announced.public_ip, theirs.vtep_mac))
    }

    /// The address that is published in the place of the host's own; or the text that is none.
    pub(super) fn overwrite(&self) -> Option<Result<Ipv4Addr, &str>> {
        self.public_ip_overwrite.as_deref().map(address)
    }

    /// The address that counts as `--public-ip`; or the text that is none.
    pub(super) fn node_public_ip(&self) -> Option<Result<Ipv4Addr, &str>> {
        self.node_public_ip.as_deref().map(address)
    }
}

fn address(text: &str) -> Result<Ipv4Addr, &str> {
    go_values::ipv4(text).map_err(|_| text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// flannel: pkg/subnet/kube/annotations_test.go.
    #[test]
    fn prefixes_are_flannels() {
        for (prefix, whole) in [
            ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/"),
            ("org.com/", "org.com/"),
            ("org.com/stuff", "org.com/stuff-"),
            ("org.com/stuff-", "org.com/stuff-"),
            ("fla_nnel.com", "fla_nnel.com/"),
        ] {
            assert_eq!(Names::new(prefix).expect(prefix).prefix(), whole);
        }
        for prefix in ["org", "org.com/a/b", "org.com/Stuff", "org.com/stuff/", "", "Org.COM"] {
            assert!(Names::new(prefix).is_err(), "{prefix}");
        }
    }

    fn names() -> Names {
        Names::new("flannel.alpha.coreos.com").expect("flannel's own")
    }

    fn announcement(pairs: &[(&str, &str)]) -> Announcement {
        let name = |suffix| format!("flannel.alpha.coreos.com/{suffix}");
        names().read(pairs.iter().map(|(suffix, value)| (name(suffix), (*value).to_owned())).collect())
    }

    const DATA: &str = r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#;

    #[test]
    fn only_what_differs_is_written() {
        let mac = MacAddress([0xc6, 0xd2, 0x32, 0x6f, 0x8f, 0x44]);
        let attributes = LeaseAttributes::vxlan([192, 168, 64, 3].into(), 1, mac);
        let whole = [
            ("kube-subnet-manager", "true"),
            ("backend-type", "vxlan"),
            ("backend-data", DATA),
            ("public-ip", "192.168.64.3"),
        ];
        assert_eq!(names().patch(&announcement(&whole), &attributes), None);
        assert_eq!(announcement(&whole).attributes().expect("attributes"), attributes);
        let patch = names().patch(&announcement(&whole[..3]), &attributes).expect("differs");
        assert_eq!(
            patch.to_string(),
            r#"{"metadata":{"annotations":{"flannel.alpha.coreos.com/public-ip":"192.168.64.3"}}}"#
        );
        let patch = names().patch(&announcement(&[]), &attributes).expect("differs");
        for (suffix, value) in whole {
            assert_eq!(patch["metadata"]["annotations"][names().name(suffix)], *value);
        }
    }

    #[test]
    fn a_host_without_a_backend_type_is_announced_once() {
        let alloc = LeaseAttributes::without_data([192, 168, 64, 3].into(), "");
        let mut announced =
            vec![("kube-subnet-manager", "true"), ("backend-data", "null"), ("public-ip", "192.168.64.3")];
        assert_eq!(names().patch(&announcement(&announced), &alloc), None);
        announced.push(("backend-type", ""));
        assert_eq!(names().patch(&announcement(&announced), &alloc), None);
        assert_eq!(announcement(&announced).attributes().expect("attributes").backend_type, "");
        // What a backend before announced goes.
        let before = [announced[0], ("backend-type", "vxlan"), ("backend-data", DATA), announced[2]];
        let patch = names().patch(&announcement(&before), &alloc).expect("differs");
        let annotations = &patch["metadata"]["annotations"];
        assert_eq!(
            (&annotations[names().name("backend-type")], &annotations[names().name("backend-data")]),
            (&json!(""), &json!("null"))
        );
    }

    #[test]
    fn nonsense_is_said() {
        for (pairs, reason) in [
            (vec![], "it has no annotation public-ip"),
            (vec![("public-ip", "300.1.1.1")], "its annotation public-ip \"300.1.1.1\" is no IPv4 address"),
            (
                vec![("public-ip", "1.2.3.4"), ("backend-data", r#"{"VNI":1,"#)],
                "its annotation backend-data is no JSON",
            ),
        ] {
            let error = announcement(&pairs).attributes().expect_err(reason);
            assert!(error.starts_with(reason), "{error}");
        }
        assert_eq!(
            announcement(&[("public-ip-overwrite", "203.0.113.7")]).overwrite(),
            Some(Ok([203, 0, 113, 7].into()))
        );
        assert_eq!(announcement(&[("public-ip-overwrite", "here")]).overwrite(), Some(Err("here")));
    }
}
