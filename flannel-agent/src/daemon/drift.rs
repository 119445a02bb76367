//! Bringing back in step what somebody else changed on this host: what the kernel tells of, as it does, and what it tells
//! nobody of, by looking every second.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::{
    DaemonError,
    agent::{Agent, COMPARE_PERIOD},
    setup::load,
};
use crate::{
    bypass::BypassFlag,
    conntrack,
    dataplane::{Hook, Repaired},
    device::{
        self, Changed, Link,
        external::{External, SelectError},
        offload::Offloads,
        vxlan::VxlanDevice,
    },
    registry::ResyncCause,
    repair::Repair,
    subnet_env::State,
    xdp,
};

/// How often what changes without an event is looked at.
pub(super) const LOOK_PERIOD: Duration = Duration::from_secs(1);
/// How often everything is asked for that events tell of anyway, route by route.
pub(super) const ROUTES_PERIOD: Duration = Duration::from_secs(60);
/// For how long another interface has to be the right one before the tunnel moves to it.
const SETTLED: Duration = Duration::from_millis(900);

/// What only others can repair, by what it is about.
const EXTERNAL: &str = "external interface";
const PINS: &str = "pin directory";
const FORWARDING: &str = "forwarding";
const SUBNET_ENV: &str = "subnet.env";

impl Agent<'_> {
    /// Makes the device, what leads into it and what is attached to it, or what of that is not there. What there was to do.
    pub(super) async fn ensure_datapath(&mut self) -> Result<(Link, Vec<Repair>), DaemonError> {
        let Self { netlink, dataplane, underlay, external, device, own, network, .. } = self;
        let (link, device_repair) = netlink.ensure_vxlan(device, own.vtep_mac.0).await?;
        underlay.set_overlay(link.index);
        dataplane.peers.set_overlay_device(link.index)?;
        dataplane.attach(Hook::FromUnderlay, &external.link.name, external.link.index)?;
        dataplane.attach(Hook::FromOverlay, &link.name, link.index)?;
        dataplane.attach(Hook::ToOverlay, &link.name, link.index)?;
        let address = netlink.ensure_address(&link, network.network, own.key.subnet.network()).await?;
        let route = self.ensure_routes(&link).await?;
        let blackhole = self.cli.packet_rules.ip_blackhole_route.then_some(self.own.key.subnet);
        self.netlink.set_blackhole(self.device.vni, blackhole).await?;
        self.attach_pods_or_say().await;
        self.ensure_xdp()?;
        let repairs = match device_repair {
            // What hangs on it went with it.
            Some(Repair::Device) => vec![Repair::Device],
            other => other.into_iter().chain(address.then_some(Repair::DeviceAddress)).chain(route).collect(),
        };
        Ok((link, repairs))
    }

    /// Loads the programs anew, and makes everything for the lease and the external interface as they are now.
    pub(super) async fn rebuild(&mut self) -> Result<Link, DaemonError> {
        // The maps with the peers are adopted, and the programs swapped in one step each.
        let dataplane = load(self.cli, &self.network, &self.external, &self.device, &self.own)?;
        let before = std::mem::replace(&mut self.dataplane, dataplane);
        self.dataplane.succeed(before);
        self.restrict_or_say();
        self.compare(Changed::Topology).await?;
        let (link, _made) = self.ensure_datapath().await?;
        self.set_rules().await;
        self.write_subnet_env()?;
        Ok(link)
    }

    /// Repairs and compares. What fails is said, and tried again at the next event or period.
    pub(super) async fn compare_or_say(&mut self, event: Changed) {
        if event == Changed::Topology {
            self.follow_external().await;
        }
        match event {
            Changed::TrafficControl | Changed::Neighbour => {}
            Changed::Way => self.choose_routes_again().await,
            Changed::Route | Changed::Topology => self.ensure_or_say().await,
        }
        if let Err(error) = self.compare(event).await {
            warn!("{error}; comparing again in {COMPARE_PERIOD:?}");
        }
    }

    pub(super) async fn ensure_or_say(&mut self) {
        // Without it there is nothing to make the device on.
        if !self.has_external {
            return;
        }
        match self.ensure_datapath().await {
            Ok((link, repairs)) => {
                for repair in repairs {
                    self.record.repaired(repair, &link.name);
                }
            }
            Err(error) => warn!("{error}; trying again in {COMPARE_PERIOD:?}"),
        }
    }

    /// Looks at what changes without an event.
    pub(super) async fn look(&mut self) {
        match self.dataplane.repair() {
            Ok(Repaired { programs, pins }) => {
                for _ in 0..programs {
                    self.record.repaired(Repair::Program, "a program was detached");
                }
                if pins > 0 {
                    self.record.repaired(Repair::Pin, &format!("{pins} pins were gone"));
                }
                self.record.waiting(PINS, None);
            }
            Err(error) => self.record.waiting(PINS, Some(format!("{error}; the programs run on meanwhile"))),
        }
        match self.dataplane.peers.verify() {
            Ok(0) => {}
            Ok(entries) => self.record.repaired(Repair::MapEntry, &format!("{entries} entries had other values")),
            Err(error) => warn!("{error}; looking again in {LOOK_PERIOD:?}"),
        }
        match device::enable_forwarding() {
            Ok(changed) => {
                if changed {
                    self.record.repaired(Repair::IpForward, "net.ipv4.ip_forward was off");
                }
                self.record.waiting(FORWARDING, None);
            }
            Err(error) => self.record.waiting(FORWARDING, Some(error.to_string())),
        }
        self.ensure_files();
        if self.ensure_conntrack() {
            self.record.repaired(Repair::Conntrack, "conntrack was strict about windows");
        }
        if !self.has_external || self.is_rebuild_due {
            self.compare_or_say(Changed::Topology).await;
        }
    }

    /// Writes again what others read of this host, where it is gone.
    fn ensure_files(&mut self) {
        let path = self.cli.subnet_file();
        let state = self.subnet_env().state(&path);
        let was_incomplete = std::mem::replace(&mut self.is_subnet_env_incomplete, state == State::Incomplete);
        let what = match state {
            State::Gone => "was gone",
            // Not at once: somebody may be writing it.
            State::Incomplete if was_incomplete => "lacked what a runtime needs",
            State::Incomplete => return,
            State::AsItShould => return self.record.waiting(SUBNET_ENV, None),
            // Another daemon serves this host's pods now, or an administrator means it. Two that correct each other would
            // never end.
            State::OfAnother(subnet) => {
                let own = self.own.key.subnet;
                let text = format!(
                    "{} names {subnet}, which somebody else wrote, and not this host's {own}; remove it to have it written again",
                    path.display()
                );
                return self.record.waiting(SUBNET_ENV, Some(text));
            }
        };
        // First, as at the start: the CNI plugin takes a subnet.env without a status beside it for another daemon's.
        self.record.restore_files(&self.own, &self.table);
        match self.write_subnet_env() {
            Ok(()) => {
                self.is_subnet_env_incomplete = false;
                self.record.waiting(SUBNET_ENV, None);
                self.record.repaired(Repair::SubnetEnv, &format!("{} {what}", path.display()));
            }
            Err(error) => self.record.waiting(SUBNET_ENV, Some(error.to_string())),
        }
    }

    /// Where the bypass needs it. Whether there was something to do.
    pub(super) fn ensure_conntrack(&mut self) -> bool {
        let has_bypass = self.cli.bypass != BypassFlag::Off;
        let changed = has_bypass && self.conntrack.ensure();
        if has_bypass {
            let ends = self.endings.ensure(&self.dataplane.forgetter());
            self.record.ends(ends);
        }
        self.record.bypass(self.cli.bypass, self.cli.bypass_time(), conntrack::is_liberal());
        changed
    }

    /// Finds the external interface again, by the rule that it was chosen by. Where anything about it is different, all
    /// that depends on it is brought in step.
    pub(super) async fn follow_external(&mut self) {
        let found = self.netlink.external_interface_again(&self.selection, &self.external).await;
        let found = match found {
            Ok(found) => found,
            Err(error) => return self.miss_external(&error),
        };
        if found.link.name == self.external.link.name {
            self.other_since = None;
        } else if self.other_since.get_or_insert_with(Instant::now).elapsed() < SETTLED {
            // The one before may just be coming back.
            self.has_external = false;
            return;
        }
        let is_same = found == self.external;
        if is_same && !self.is_rebuild_due {
            self.has_external = true;
            self.record.waiting(EXTERNAL, None);
            return;
        }
        if !is_same {
            info!("the external interface is {}, before {}", describe(&found), describe(&self.external));
        }
        let result = self.move_to_external(found).await;
        match result {
            Ok(()) => {
                self.record.waiting(EXTERNAL, None);
                self.record.repaired(Repair::ExternalInterface, &describe(&self.external));
            }
            Err(error) => warn!("{error}; trying again in {LOOK_PERIOD:?}"),
        }
    }

    async fn move_to_external(&mut self, external: External) -> Result<(), DaemonError> {
        self.is_rebuild_due = true;
        self.has_external = true;
        let address_before = std::mem::replace(&mut self.external, external).address;
        self.device = VxlanDevice::new(&self.network.backend, &self.external);
        self.underlay.set_external(self.external.clone());
        self.xdp = xdp::choose(self.cli.xdp, &self.external.link, &Offloads::of(&self.external.link).await);
        self.record.external(&self.external, &self.device);
        if address_before != self.external.address {
            self.registry.disconnect();
            self.watch(ResyncCause::Connection);
        }
        let public_ip = self.external.public_ip;
        self.public_ip.send_if_modified(|announced| std::mem::replace(announced, public_ip) != public_ip);
        self.rebuild().await?;
        self.is_rebuild_due = false;
        Ok(())
    }

    fn miss_external(&mut self, error: &SelectError) {
        self.has_external = false;
        let name = &self.external.link.name;
        self.record.waiting(EXTERNAL, Some(format!("the external interface {name} is away, waiting for it: {error}")));
    }
}

fn describe(external: &External) -> String {
    let External { link, address, public_ip } = external;
    format!("{} ({}) with address {address}, published as {public_ip}, MTU {}", link.name, link.index, link.mtu)
}
