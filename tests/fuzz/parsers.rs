//! Everything that the agent reads and did not write itself: from the store, from files, from its socket. Nothing may
//! panic, and what is read must say what was written. The first byte of the input chooses the parser.
#![no_main]

use flannel_agent::{
    cni::{
        delegate_conf::DelegateConf,
        request::{Network, Operation, Request as CniRequest},
        subnet_file::SubnetFile,
    },
    config::NetworkConfig,
    control::Request,
    last_known::LastKnown,
    lease::{LeaseAttributes, LeaseKey, allocate, is_allocatable},
    status::Status,
    subnet_env,
};
use libfuzzer_sys::fuzz_target;
use rand::{SeedableRng as _, rngs::SmallRng};

fuzz_target!(|input: &[u8]| {
    let Some((parser, input)) = input.split_first() else { return };
    let text = String::from_utf8_lossy(input);
    match parser % 8 {
        0 => key(&text),
        1 => value(input),
        2 => config(&text),
        3 => drop(LastKnown::parse(input)),
        4 => drop((serde_json::from_slice::<Request>(input), serde_json::from_slice::<Status>(input))),
        5 => drop(subnet_env::subnet_in(&text)),
        6 => drop(CniRequest::parse(Operation::Gc, |_| Some(text.to_string()), input)),
        _ => delegate_conf(&text),
    }
});

/// A key is what it prints as.
fn key(text: &str) {
    let Ok(key) = text.parse::<LeaseKey>() else { return };
    assert_eq!(key.to_string().parse(), Ok(key));
    assert_eq!(key.subnet, key.subnet.trunc());
}

/// A value is what it prints as, and names a VTEP or says why not.
fn value(input: &[u8]) {
    let Ok(attributes) = LeaseAttributes::from_json(input) else { return };
    let again = LeaseAttributes::from_json(attributes.to_json().as_bytes());
    assert_eq!(again.ok().as_ref(), Some(&attributes));
    if let Ok(data) = attributes.vxlan_data() {
        assert!(data.vtep_mac.is_unicast());
    }
}

/// Every subnet of a valid config lies where it says, and one can be had.
fn config(text: &str) {
    let Ok(config) = NetworkConfig::parse(text) else { return };
    assert!(config.subnet_min <= config.subnet_max);
    let subnet = allocate(&config, [], &mut SmallRng::seed_from_u64(0));
    assert!(subnet.is_some_and(|subnet| is_allocatable(&config, subnet)), "{config:?}: {subnet:?}");
}

/// What a delegate is given is read back as it is.
fn delegate_conf(text: &str) {
    let (network, env) = text.split_once('\n').unwrap_or((text, ""));
    let Ok(network) = Network::parse(network.as_bytes()) else { return };
    let Ok(subnet) = SubnetFile::parse("subnet.env".as_ref(), env) else { return };
    let Ok(conf) = DelegateConf::generate(&network, &subnet) else { return };
    if !conf.plugin().is_empty() {
        let again = DelegateConf::parse(&conf.to_bytes()).map(|conf| conf.to_bytes());
        assert_eq!(again.ok(), Some(conf.to_bytes()));
    }
}
