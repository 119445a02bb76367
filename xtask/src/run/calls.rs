//! A pod is called by its address, by a name and through a port of a host, as in a cluster.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    path::{Path, PathBuf},
};

use anyhow::Result;

use crate::{
    lab::{
        Backend, Host, Lab,
        capture::Capture,
        servers::{DnsServer, WebServer, curl, resolv_conf},
        services::{Service, ServiceRules},
    },
    progress::heading,
};

const DNS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 10), 53);
const WEB: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 20), 80);
const NAME: &str = "test";
const NODE_PORT: u16 = 30002;

/// What pods of the second host serve, and the services that lead there.
pub(super) struct Served {
    _web: WebServer,
    _dns: DnsServer,
    services: [Service; 2],
    resolver: PathBuf,
}

impl Served {
    /// A web server in its first pod and a DNS server in its second.
    pub(super) fn start(host: &Host, directory: &Path) -> Result<Self> {
        let [web, dns, ..] = &host.pods[..] else { anyhow::bail!("{} has not two pods", host.name) };
        let resolver = directory.join("resolv.conf");
        fs::write(&resolver, resolv_conf(*DNS.ip()))?;
        let service = |name, protocol, address: SocketAddrV4, node_port, pod| Service {
            name,
            protocol,
            address,
            node_port,
            endpoints: vec![SocketAddrV4::new(pod, address.port())],
        };
        Ok(Self {
            _web: WebServer::start(web, WEB.port(), &format!("{}-pod1", host.name))?,
            _dns: DnsServer::start(dns, &[(NAME, *WEB.ip())], directory)?,
            services: [
                service("dns", "udp", DNS, None, dns.address),
                service(NAME, "tcp", WEB, Some(NODE_PORT), web.address),
            ],
            resolver,
        })
    }

    /// Calls in each way: with the rules of kube-proxy's one form and all packets in the tunnel, then with those of the other.
    pub(super) fn tour(&self, lab: &Lab, hosts: &[Host], backend: Backend) -> Result<()> {
        let [first, second, ..] = hosts else { anyhow::bail!("a tour needs two hosts") };
        let pod = (format!("{}-pod1", first.name), &first.pods[0].netns);
        let itself = (first.name.clone(), &first.netns);
        let outside = ("outside".to_owned(), &lab.underlay);
        for rules in ServiceRules::FORMS {
            heading(&format!("three ways to a pod, with kube-proxy's rules in {}", rules.name()));
            hosts.iter().try_for_each(|host| rules.set(host, &self.services))?;
            let own = if rules.serves_localhost() { Ipv4Addr::LOCALHOST } else { first.address };
            let to_port = |address: Ipv4Addr| format!("{address}:{NODE_PORT}");
            let calls = [
                ("by its address", &pod, second.pods[0].address.to_string()),
                ("by a name, which dnsmasq has in a pod behind a service address", &pod, NAME.to_owned()),
                ("by a port of a host, which has not the pod", &itself, to_port(own)),
                ("from outside", &outside, to_port(first.address)),
                ("by a port of the host that has the pod", &outside, to_port(second.address)),
            ];
            for (index, (how, (from, netns), to)) in calls.iter().enumerate() {
                // The last one needs no tunnel; nor does any, where hosts on one link need none.
                let capture = backend.encapsulates() && rules == ServiceRules::FORMS[0] && index + 1 < calls.len();
                let capture = capture.then(|| Capture::start(&first.netns, "eth0", "udp port 8472", lab.directory()));
                let mut capture = capture.transpose()?;
                let answer = curl(netns, &format!("http://{to}/"), Some(&self.resolver))?;
                println!("{how}: {from}$ curl {to}");
                println!("   {} answers: {}, asked by {}", answer.from, answer.server, answer.seen_as);
                if let Some(capture) = &mut capture {
                    capture.end_with("HTTP/1.1 200 OK")?;
                    for packet in capture.tunnelled("http or dns")? {
                        println!("   {packet}");
                    }
                }
            }
        }
        Ok(())
    }
}
