//! Service addresses and node ports, by the rules that kube-proxy sets on every host (kubernetes/pkg/proxy/iptables and
//! pkg/proxy/nftables), without what only load balancers and traffic policies need.
//!
//! Chains have the service's own name where kube-proxy's have a hash of it.

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, SocketAddrV4},
};

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use super::Host;

/// What pods have addresses of, in all labs: kube-proxy's `--cluster-cidr`.
const PODS: &str = "10.4.0.0/14";

/// One port of a service.
#[derive(Clone, Debug)]
pub struct Service {
    /// At most twelve letters, of which chains' names are made.
    pub name: &'static str,
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// Its cluster address and port.
    pub address: SocketAddrV4,
    /// The port of every host that leads to it.
    pub node_port: Option<u16>,
    /// The pods that answer, each as likely as the others; at least one.
    pub endpoints: Vec<SocketAddrV4>,
}

/// What else kube-proxy is told.
#[derive(Clone, Copy, Debug, Default)]
pub struct ServiceOptions {
    /// `--masquerade-all`: also what pods send to a service.
    pub masquerade_all: bool,
    /// `sessionAffinity: ClientIP` of all services: for how many seconds an address is answered by the pod that answered it
    /// last.
    pub affinity: Option<u32>,
}

/// In which form kube-proxy sets its rules (`--proxy-mode`), and for iptables, by which of the two programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ServiceRules {
    /// iptables, into nftables' tables
    Iptables,
    /// iptables, into its own
    #[value(skip)]
    LegacyIptables,
    /// nftables
    Nftables,
}

impl ServiceRules {
    /// Both forms, by the programs that are usual for them.
    pub const FORMS: [Self; 2] = [Self::Iptables, Self::Nftables];
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Iptables, Self::LegacyIptables, Self::Nftables];

    /// What the form is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::LegacyIptables => "iptables-legacy",
            Self::Nftables => "nftables",
        }
    }

    /// Whether node ports are served at `localhost` too.
    pub fn serves_localhost(self) -> bool {
        self != Self::Nftables
    }

    /// Has a host translate what is for these services, in this form only, and for no others.
    ///
    /// # Errors
    /// Where the rules can't be set.
    pub fn set(self, host: &Host, services: &[Service]) -> Result<()> {
        self.set_text(host, &self.text(host.address, services))
    }

    /// The same by a text of [`ServiceRules::text`]'s kind.
    ///
    /// # Errors
    /// Where the rules can't be set.
    pub fn set_text(self, host: &Host, text: &str) -> Result<()> {
        Self::ALL.into_iter().try_for_each(|rules| rules.remove(host))?;
        if self.serves_localhost() {
            host.netns.exec("sysctl -qw net.ipv4.conf.all.route_localnet=1")?;
        }
        self.feed(host, text)
    }

    fn feed(self, host: &Host, text: &str) -> Result<()> {
        let line = match self {
            Self::Iptables => "iptables-nft-restore --noflush",
            Self::LegacyIptables => "iptables-legacy-restore --noflush",
            Self::Nftables => "nft -f -",
        };
        host.netns
            .feed(line, text)
            .map(drop)
            .with_context(|| format!("set the rules of services on {}:\n{text}", host.name))
    }

    /// Takes all rules of this form away.
    ///
    /// # Errors
    /// Where they can't be listed or changed.
    pub fn remove(self, host: &Host) -> Result<()> {
        let program = match self {
            // Made first, as what is not there can't be deleted.
            Self::Nftables => {
                let text = "table ip kube-proxy\ndelete table ip kube-proxy\n";
                return host.netns.feed("nft -f -", text).map(drop);
            }
            Self::Iptables => "iptables-nft",
            Self::LegacyIptables => "iptables-legacy",
        };
        let saved = host.netns.exec(&format!("{program}-save"))?;
        if !saved.contains("KUBE-") {
            return Ok(());
        }
        let others: String =
            saved.lines().filter(|line| !line.contains("KUBE-")).map(|line| format!("{line}\n")).collect();
        host.netns.feed(&format!("{program}-restore"), &others).map(drop)
    }

    /// Puts the rules of these services in the place of those that a host has by [`ServiceRules::set`], at once, so that no
    /// packet meets none.
    ///
    /// # Errors
    /// Where the rules can't be set.
    pub fn replace(self, host: &Host, services: &[Service]) -> Result<()> {
        let text = self.text(host.address, services);
        if self == Self::Nftables {
            return self.feed(host, &format!("delete table ip kube-proxy\n{text}"));
        }
        // A chain that is named is emptied. The kernel's own lead to these already.
        let is_ours = |line: &&str| !line.starts_with("-A ") || line.starts_with("-A KUBE-");
        let text: String = text.lines().filter(is_ours).map(|line| format!("{line}\n")).collect();
        self.feed(host, &text)
    }

    /// The rules of a host with that address, for `iptables-restore` or `nft`.
    #[must_use]
    pub fn text(self, host: Ipv4Addr, services: &[Service]) -> String {
        self.text_with(ServiceOptions::default(), host, services)
    }

    /// The same with options.
    #[must_use]
    pub fn text_with(self, options: ServiceOptions, host: Ipv4Addr, services: &[Service]) -> String {
        if self == Self::Nftables { nftables(options, host, services) } else { iptables(options, services) }
    }
}

const IPTABLES_FILTER: &str = r#"*filter
:KUBE-FORWARD - [0:0]
:KUBE-FIREWALL - [0:0]
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A INPUT -j KUBE-FIREWALL
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL -m comment --comment "block incoming localnet connections" -d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
"#;

const IPTABLES_NAT: &str = r#"*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
"#;

fn iptables(options: ServiceOptions, services: &[Service]) -> String {
    let mut chains = String::new();
    let mut rules = String::new();
    for service in services {
        // Writing to a string does not fail.
        let _written = write_iptables(&mut chains, &mut rules, options, service);
    }
    let last = r#"-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"#;
    format!("{IPTABLES_FILTER}{IPTABLES_NAT}{chains}{rules}{last}\nCOMMIT\n")
}

fn write_iptables(
    chains: &mut String,
    rules: &mut String,
    options: ServiceOptions,
    service: &Service,
) -> std::fmt::Result {
    let Service { name, protocol, address, node_port, endpoints } = service;
    let (ip, port) = (address.ip(), address.port());
    let id = format!("{name}-{protocol}").to_uppercase();
    let to_address = format!(
        r#"-m comment --comment "default/{name} cluster IP" -m {protocol} -p {protocol} -d {ip} --dport {port}"#
    );
    writeln!(chains, ":KUBE-SVC-{id} - [0:0]")?;
    writeln!(rules, "-A KUBE-SERVICES {to_address} -j KUBE-SVC-{id}")?;
    if let Some(node_port) = node_port {
        writeln!(chains, ":KUBE-EXT-{id} - [0:0]")?;
        let comment = format!(r#"-m comment --comment "default/{name}""#);
        writeln!(
            rules,
            "-A KUBE-NODEPORTS {comment} -m {protocol} -p {protocol} --dport {node_port} -j KUBE-EXT-{id}"
        )?;
        let external = format!("masquerade traffic for default/{name} external destinations");
        writeln!(rules, r#"-A KUBE-EXT-{id} -m comment --comment "{external}" -j KUBE-MARK-MASQ"#)?;
        writeln!(rules, "-A KUBE-EXT-{id} -j KUBE-SVC-{id}")?;
    }
    let masqueraded = if options.masquerade_all { String::new() } else { format!("! -s {PODS} ") };
    writeln!(rules, "-A KUBE-SVC-{id} {to_address} {masqueraded}-j KUBE-MARK-MASQ")?;
    // Who was answered by one is sent there again, before any is drawn.
    for (index, endpoint) in endpoints.iter().enumerate() {
        if let Some(seconds) = options.affinity {
            let recent = format!("-m recent --name KUBE-SEP-{id}-{index} --rcheck --seconds {seconds} --reap");
            writeln!(
                rules,
                r#"-A KUBE-SVC-{id} -m comment --comment "default/{name} -> {endpoint}" {recent} -j KUBE-SEP-{id}-{index}"#
            )?;
        }
    }
    for (index, endpoint) in endpoints.iter().enumerate() {
        writeln!(chains, ":KUBE-SEP-{id}-{index} - [0:0]")?;
        let comment = format!(r#"-m comment --comment "default/{name} -> {endpoint}""#);
        // The last takes what the ones before it left.
        let share = match endpoints.len() - index {
            1 => String::new(),
            left => format!(" -m statistic --mode random --probability {:.10}", 1.0 / left as f64),
        };
        writeln!(rules, "-A KUBE-SVC-{id} {comment}{share} -j KUBE-SEP-{id}-{index}")?;
        // A pod that is answered by itself has to be answered by the service.
        writeln!(rules, "-A KUBE-SEP-{id}-{index} {comment} -s {} -j KUBE-MARK-MASQ", endpoint.ip())?;
        let recent = match options.affinity {
            Some(_) => format!(" -m recent --name KUBE-SEP-{id}-{index} --set"),
            None => String::new(),
        };
        writeln!(
            rules,
            "-A KUBE-SEP-{id}-{index} {comment}{recent} -m {protocol} -p {protocol} -j DNAT --to-destination {endpoint}"
        )?;
    }
    Ok(())
}

fn nftables(options: ServiceOptions, host: Ipv4Addr, services: &[Service]) -> String {
    let (mut addresses, mut ports) = (Vec::new(), Vec::new());
    let mut chains = String::new();
    for Service { name, protocol, address, node_port, endpoints } in services {
        let (ip, port) = (address.ip(), address.port());
        let id = format!("default/{name}/{protocol}");
        addresses.push(format!("{ip} . {protocol} . {port} : goto service-{id}"));
        let endpoint_id = |endpoint: &SocketAddrV4| format!("{id}__{}/{}", endpoint.ip(), endpoint.port());
        let endpoint_chain = |endpoint: &SocketAddrV4| format!("endpoint-{}", endpoint_id(endpoint));
        // Who was answered by one is sent there again, before any is drawn.
        let mut affine = String::new();
        for endpoint in endpoints {
            let mut update = String::new();
            if let Some(seconds) = options.affinity {
                let set = format!("affinity-{}", endpoint_id(endpoint));
                chains += &format!("set {set} {{ type ipv4_addr; flags dynamic,timeout; timeout {seconds}s; }}\n");
                affine += &format!("ip saddr @{set} goto {}\n ", endpoint_chain(endpoint));
                update = format!("update @{set} {{ ip saddr }}\n ");
            }
            chains += &format!(
                "chain {} {{\n ip saddr {} jump mark-for-masquerade\n {update}meta l4proto {protocol} dnat to {endpoint}\n}}\n",
                endpoint_chain(endpoint),
                endpoint.ip()
            );
        }
        let masqueraded = if options.masquerade_all { String::new() } else { format!("ip saddr != {PODS} ") };
        let targets = endpoints.iter().enumerate();
        let targets = targets.map(|(index, endpoint)| format!("{index} : goto {}", endpoint_chain(endpoint)));
        chains += &format!(
            "chain service-{id} {{\n ip daddr {ip} {protocol} dport {port} {masqueraded}jump mark-for-masquerade\n \
             {affine}numgen random mod {} vmap {{ {} }}\n}}\n",
            endpoints.len(),
            targets.collect::<Vec<_>>().join(", ")
        );
        if let Some(node_port) = node_port {
            ports.push(format!("{protocol} . {node_port} : goto external-{id}"));
            chains += &format!("chain external-{id} {{\n jump mark-for-masquerade\n goto service-{id}\n}}\n");
        }
    }
    let elements = |elements: Vec<String>| match elements.as_slice() {
        [] => String::new(),
        elements => format!("elements = {{ {} }}", elements.join(", ")),
    };
    let (addresses, ports) = (elements(addresses), elements(ports));
    format!(
        r#"table ip kube-proxy {{
comment "rules for kube-proxy"
set nodeport-ips {{ type ipv4_addr; elements = {{ {host} }} }}
map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; {addresses} }}
map service-nodeports {{ type inet_proto . inet_service : verdict; {ports} }}
chain nat-prerouting {{ type nat hook prerouting priority dstnat; policy accept; jump services; }}
chain nat-output {{ type nat hook output priority -100; policy accept; jump services; }}
chain nat-postrouting {{ type nat hook postrouting priority srcnat; policy accept; jump masquerading; }}
chain services {{
 ip daddr . meta l4proto . th dport vmap @service-ips
 ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
}}
chain mark-for-masquerade {{ meta mark set meta mark or 0x4000; }}
chain masquerading {{
 meta mark and 0x4000 == 0 return
 meta mark set meta mark xor 0x4000
 masquerade fully-random
}}
{chains}}}
"#
    )
}
