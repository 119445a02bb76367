//! Configurations, and what is said of them.

use flannel_common::vxlan::Vni;

use super::*;

fn parse(fields: &str) -> Result<NetworkConfig, ConfigError> {
    NetworkConfig::parse(&format!(r#"{{{fields}, "Backend": {{"Type": "vxlan"}}}}"#))
}

fn backend(json: &str) -> Result<VxlanConfig, ConfigError> {
    NetworkConfig::parse(&format!(r#"{{"Network": "10.5.0.0/16", "Backend": {json}}}"#)).map(vxlan)
}

fn vxlan(config: NetworkConfig) -> VxlanConfig {
    let BackendConfig::Vxlan(vxlan) = config.backend else { panic!("{:?}", config.backend) };
    vxlan
}

fn range(fields: &str) -> (u8, String, String) {
    let config = parse(fields).expect("valid");
    (config.subnet_len, config.subnet_min.to_string(), config.subnet_max.to_string())
}

#[test]
fn flannels_defaults() {
    let cases = [
        (r#""Network": "10.1.0.0/16""#, 24, "10.1.1.0", "10.1.255.0"),
        (r#""Network": "10.1.0.0/22""#, 24, "10.1.1.0", "10.1.3.0"),
        (r#""Network": "10.1.0.0/23""#, 25, "10.1.0.128", "10.1.1.128"),
        (r#""Network": "10.1.0.0/28""#, 30, "10.1.0.4", "10.1.0.12"),
        (r#""Network": "10.1.7.9/16", "SubnetLen": 18"#, 18, "10.1.64.0", "10.1.192.0"),
    ];
    for (fields, len, min, max) in cases {
        assert_eq!(range(fields), (len, min.to_owned(), max.to_owned()), "{fields}");
    }
    assert_eq!(
        backend(r#"{"Type": "vxlan"}"#),
        Ok(VxlanConfig { vni: Vni::DEFAULT, port: 8472, mtu: None, learning: false, direct_routing: false })
    );
}

#[test]
fn keys_have_no_case_and_the_last_value_counts() {
    let config = NetworkConfig::parse(
        r#"{"NETWORK": "10.1.0.0/16", "network": "10.2.0.0/16", "Unknown": 1, "subnetLEN": 25, "enableNFTables": true,
            "backend": {"TYPE": "VXLAN", "vni": 7, "port": 4789, "mtu": 9000}}"#,
    )
    .expect("valid");
    assert_eq!(config.network.to_string(), "10.2.0.0/16");
    assert_eq!((config.subnet_len, config.enable_nftables), (25, Some(true)));
    let backend = vxlan(config);
    assert_eq!((backend.vni.get(), backend.port, backend.mtu), (7, 4789, Some(9000)));
}

/// What Go's decoder makes of the same bytes.
#[test]
fn what_gos_decoder_takes_is_taken() {
    for (fields, len) in [
        // The last in the order of the text, however it is spelt.
        (r#""subnetlen": 25, "SUBNETLEN": 26, "subnetlen": 27"#, 27),
        // null leaves what was before.
        (r#""SubnetLen": 25, "SubnetLen": null"#, 25),
        (r#""SubnetLen": null, "EnableIPv6": null, "SubnetMin": null"#, 24),
        // Two letters that Unicode folds into ASCII's.
        (r#""ſubnetLen": 25"#, 25),
        (r#""Subnet\u004cen": 25"#, 25),
        // Not given, in the only way that Go's struct has.
        (r#""SubnetLen": 0, "SubnetMin": "0.0.0.0", "SubnetMax": "0.0.0.0""#, 24),
        (r#""SubnetMin": "::ffff:10.1.2.0""#, 24),
        // What belongs to no key is not looked at, nor what is of IPv6.
        (r#""Comment": {"a": [1e999, "\ud800"]}, "IPv6Network": "", "IPv6SubnetLen": "x""#, 24),
    ] {
        let config = parse(&format!(r#""Network": "10.1.0.0/16", {fields}"#)).expect(fields);
        assert_eq!(config.subnet_len, len, "{fields}");
    }
    assert_eq!(parse("\"Networ\u{212a}\": \"10.1.0.0/016\"").expect("valid").network.to_string(), "10.1.0.0/16");
    let deep = format!(r#""Network": "10.1.0.0/16", "Deep": {}{}"#, "[".repeat(5000), "]".repeat(5000));
    assert!(parse(&deep).is_ok());
    let replaced =
        r#"{"Network": "10.1.0.0/16", "Backend": {"Type": "vxlan", "VNI": 5}, "backend": {"Type": "vxlan"}}"#;
    assert_eq!(NetworkConfig::parse(replaced).expect("valid").backend.vni(), Vni::DEFAULT);
}

#[test]
fn rules_name_the_key_its_value_and_what_is_expected() {
    let cases = [
        (
            r#""SubnetLen": 24"#,
            r#"please define a correct Network parameter in the flannel config (as in "Network": "10.5.0.0/16")"#,
        ),
        (
            r#""Newtork": "10.1.0.0/16""#,
            r#"please define a correct Network parameter in the flannel config; it has "Newtork", did you mean "Network"? (as in "Network": "10.5.0.0/16")"#,
        ),
        (
            r#""Network": "10.1.0.0""#,
            r#"invalid CIDR address: 10.1.0.0 (Network; expected an IPv4 prefix, as in "Network": "10.5.0.0/16")"#,
        ),
        (
            r#""Network": "fc00::/48""#,
            r#"invalid CIDR address: fc00::/48 (Network; expected an IPv4 prefix, as in "Network": "10.5.0.0/16")"#,
        ),
        (
            r#""Network": "10.1.0.0/29""#,
            "network is too small. Minimum useful network prefix is /28 (Network: 10.1.0.0/29)",
        ),
        (r#""Network": "10.1.0.0/16", "SubnetLen": 31"#, "SubnetLen must be less than /31 (SubnetLen: 31)"),
        (
            r#""Network": "10.1.0.0/16", "SubnetLen": 17"#,
            "network must be able to accommodate at least four subnets (SubnetLen: 17, Network: 10.1.0.0/16)",
        ),
        (
            r#""Network": "10.1.0.0/16", "SubnetLen": -1"#,
            "SubnetLen: -1 is out of range, expected 18 to 30, or 0 for flannel's default",
        ),
        (
            r#""Network": "10.1.0.0/16", "SubnetMin": "10.2.0.0""#,
            "SubnetMin is not in the range of the Network (SubnetMin: 10.2.0.0, Network: 10.1.0.0/16)",
        ),
        (
            r#""Network": "10.1.0.0/16", "SubnetMin": "10.1.03.0""#,
            r#"invalid IP address format: "10.1.03.0" (SubnetMin; expected an IPv4 address, as in "SubnetMin": "10.5.1.0")"#,
        ),
        (
            r#""Network": "10.1.0.0/16", "SubnetMax": "10.1.3.7""#,
            "SubnetMax is not on a SubnetLen boundary: 10.1.3.7 (the subnet of length 24 that it lies in begins with 10.1.3.0)",
        ),
        (
            r#""Network": "10.1.0.0/16", "SubnetMin": "10.1.9.0", "SubnetMax": "10.1.3.0""#,
            "SubnetMin 10.1.9.0 is greater than SubnetMax 10.1.3.0",
        ),
        (
            r#""Network": "10.1.0.0/16", "EnableIPv6": true"#,
            "EnableIPv6 is not supported by this agent; remove it from the flannel config",
        ),
    ];
    for (fields, message) in cases {
        assert_eq!(parse(fields).expect_err(fields).to_string(), message);
    }
    assert!(parse(r#""Network": "0.0.0.0/0""#).is_err_and(|error| error.to_string().starts_with("please define")));
}

#[test]
fn a_value_of_another_kind_is_named_with_what_is_expected() {
    let number = "expected a whole number (as in";
    let cases = [
        (r#""SubnetLen": "26""#, format!(r#"SubnetLen: "26" is a string, {number} "SubnetLen": 26)"#)),
        (r#""SubnetLen": "/24""#, format!(r#"SubnetLen: "/24" is a string, {number} "SubnetLen": 24)"#)),
        (
            r#""SubnetLen": 24.0"#,
            format!(r#"SubnetLen: 24.0 is not written as a whole number, {number} "SubnetLen": 24)"#),
        ),
        (
            r#""SubnetLen": 1e2"#,
            format!(r#"SubnetLen: 1e2 is not written as a whole number, {number} "SubnetLen": 24)"#),
        ),
        (r#""SubnetLen": [24]"#, format!(r#"SubnetLen: [24] is a list, {number} "SubnetLen": 24)"#)),
        (r#""SubnetLen": "25", "SubnetLen": 25"#, format!(r#"SubnetLen: "25" is a string, {number} "SubnetLen": 25)"#)),
        (
            r#""EnableNFTables": "false""#,
            r#"EnableNFTables: "false" is a string, expected true or false (as in "EnableNFTables": false)"#.to_owned(),
        ),
        (
            r#""EnableIPv6": 0"#,
            r#"EnableIPv6: 0 is a number, expected true or false (as in "EnableIPv6": true)"#.to_owned(),
        ),
        (
            r#""Network": 10"#,
            r#"Network: 10 is a number, expected a string (as in "Network": "10.5.0.0/16")"#.to_owned(),
        ),
        (
            r#""Network": {"a": 1}"#,
            r#"Network: {"a": 1} is an object, expected a string (as in "Network": "10.5.0.0/16")"#.to_owned(),
        ),
        (
            r#""SubnetMin": true"#,
            r#"SubnetMin: true is true or false, expected a string (as in "SubnetMin": "10.5.1.0")"#.to_owned(),
        ),
    ];
    for (fields, message) in cases {
        let fields = if fields.contains("Network\"") {
            fields.to_owned()
        } else {
            format!(r#""Network": "10.1.0.0/16", {fields}"#)
        };
        assert_eq!(parse(&fields).expect_err(&fields).to_string(), message);
    }
    let long = parse(&format!(r#""Network": [{}1]"#, "1, ".repeat(1000))).expect_err("a list").to_string();
    assert!(long.len() < 200 && long.contains("1... is a list"), "{long}");
}

#[test]
fn backend_errors() {
    let cases = [
        (
            r#"{"Type": "ipip"}"#,
            r#"unknown backend type: ipip (Backend.Type; ipip is flannel's, and this agent does not have it; this agent has vxlan, host-gw, udp, alloc: "Backend": {"Type": "vxlan"})"#,
        ),
        (
            r#"{}"#,
            r#"unknown backend type:  (Backend.Type; this agent has vxlan, host-gw, udp, alloc: "Backend": {"Type": "vxlan"})"#,
        ),
        (
            r#"null"#,
            r#"unknown backend type:  (Backend.Type; this agent has vxlan, host-gw, udp, alloc: "Backend": {"Type": "vxlan"})"#,
        ),
        (r#""vxlan""#, r#"error decoding Backend property of config: "vxlan" (expected "Backend": {"Type": "vxlan"})"#),
        (
            r#"{"Type": 1}"#,
            r#"error decoding Backend property of config: Backend.Type: 1 is a number, expected a string (as in "Type": "vxlan")"#,
        ),
        (
            r#"{"Type": "vxlan", "VNI": "1"}"#,
            r#"Backend.VNI: "1" is a string, expected a whole number (as in "VNI": 1)"#,
        ),
        (
            r#"{"Type": "vxlan", "DirectRouting": "true"}"#,
            r#"Backend.DirectRouting: "true" is a string, expected true or false (as in "DirectRouting": true)"#,
        ),
        (r#"{"Type": "vxlan", "VNI": 10000000}"#, "Backend.VNI: 10000000 is out of range, expected 0 to 9999999"),
        (r#"{"Type": "vxlan", "VNI": -1}"#, "Backend.VNI: -1 is out of range, expected 0 to 9999999"),
        (
            r#"{"Type": "vxlan", "Port": 65536}"#,
            "Backend.Port: 65536 is out of range, expected 1 to 65535, or 0 for the default 8472",
        ),
        (
            r#"{"Type": "vxlan", "MTU": 117}"#,
            "Backend.MTU: 117 is out of range, expected 118 to 65535, or 0 for the external interface's",
        ),
        (
            r#"{"Type": "vxlan", "GBP": true}"#,
            "Backend GBP is not supported by this agent; remove it from the flannel config",
        ),
    ];
    for (json, message) in cases {
        assert_eq!(backend(json).expect_err(json).to_string(), message);
    }
    // Flannel's others, by name, and with what there is.
    for kind in ["wireguard", "ipip", "ipsec", "extension", "tencent-vpc", "ali-vpc", "aws-vpc", "gce", "WireGuard"] {
        let message = backend(&format!(r#"{{"Type": "{kind}"}}"#)).expect_err(kind).to_string();
        let whose = format!("{} is flannel's, and this agent does not have it", kind.to_lowercase());
        let expected =
            format!("unknown backend type: {kind} (Backend.Type; {whose}; this agent has vxlan, host-gw, udp, alloc: ");
        assert!(message.starts_with(&expected), "{message}");
    }
}

#[test]
fn alloc_has_a_number_and_nothing_else() {
    let alloc = |more: &str| NetworkConfig::parse(&format!(r#"{{"Network": "10.1.0.0/16", "Backend": {{{more}}}}}"#));
    let config = alloc(r#""Type": "Alloc", "VNI": 7"#).expect("valid");
    assert_eq!((config.backend.kind(), config.backend.vni().get()), (BackendType::Alloc, 7));
    let other = alloc(r#""Type": "alloc""#).expect("valid");
    assert_eq!(other.differences(&config).len(), 1, "{:?}", other.differences(&config));
    assert!(alloc(r#""Type": "alloc", "VNI": 10000000"#).is_err());
}

#[test]
fn a_missing_backend_is_flannels_udp() {
    let parse = |fields: &str| {
        NetworkConfig::parse(&format!(r#"{{"Network": "10.1.0.0/16"{fields}}}"#)).map(|config| config.backend)
    };
    let udp = |vni, port| Ok(BackendConfig::Udp(UdpConfig { vni: Vni::new_checked(vni).expect("valid"), port }));
    assert_eq!(parse(""), udp(1, 8285));
    assert_eq!(parse(r#", "Backed": {"Type": "vxlan"}"#), udp(1, 8285));
    assert_eq!(parse(r#", "Backend": {"Type": "UDP", "VNI": 3, "Port": 9000}"#), udp(3, 9000));
    assert_eq!(parse(r#", "Backend": {"Type": "udp", "Port": 0}"#), udp(1, 8285));
    let error = |backend: &str| parse(&format!(r#", "Backend": {{"Type": "udp", {backend}}}"#)).expect_err(backend);
    assert_eq!(
        error(r#""Port": 65536"#).to_string(),
        "Backend.Port: 65536 is out of range, expected 1 to 65535, or 0 for the default 8285"
    );
    assert_eq!(
        error(r#""Port": "8285""#).to_string(),
        r#"Backend.Port: "8285" is a string, expected a whole number (as in "Port": 8285)"#
    );
    let said = unknown_keys(r#"{"Network": "10.1.0.0/16", "Backed": {"Type": "vxlan"}}"#);
    assert!(said[0].contains("did you mean Backend?") && said[1].starts_with("there is no Backend"), "{said:?}");
}

#[test]
fn what_is_not_an_object_is_refused() {
    for json in [
        "",
        "[]",
        "7",
        "{",
        "null",
        "\"x\"",
        "{\"Network\": 7}",
        "{} {}",
        "{},",
        "{'a': 1}",
        "{\"a\": 1,}",
        "\u{feff}{}",
    ] {
        assert!(NetworkConfig::parse(json).is_err(), "{json}");
    }
    let error = |json: &str| NetworkConfig::parse(json).expect_err(json).to_string();
    assert_eq!(error("\u{feff}{}"), "not a JSON object: it begins with a byte order mark; remove that");
    assert_eq!(error("{} x"), "not a JSON object: trailing characters at line 1 column 4");
    assert_eq!(error("[]"), "not a JSON object: invalid type: sequence, expected an object at line 1 column 0");
}

#[test]
fn unknown_keys_are_named_with_what_they_may_mean() {
    let said = unknown_keys(
        r#"{"Newtork": 1, "Newtork": 2, "subnetlen": 24, "IPv6Network": "", "Comment": 1,
            "Backend": {"type": "vxlan", "Prot": 1, "MacPrefix": "0E-2A", "PSK": ""}}"#,
    );
    assert_eq!(
        said,
        [
            "the key Newtork is none of flannel's (did you mean Network?) and has no effect",
            "the key Comment is none of flannel's and has no effect",
            "the key Backend.Prot is none of flannel's (did you mean Backend.Port?) and has no effect",
        ]
    );
    for json in ["", "[]", r#"{"Backend": 7}"#, r#"{"Backend": {"Type": "vxlan", "vni": 1}}"#] {
        assert_eq!(unknown_keys(json), Vec::<String>::new(), "{json}");
    }
}
