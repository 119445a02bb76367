//! Each metric with its name, its labels and what it says. One enum is output, documentation and what dashboard and alerts may name.

/// How the values of a metric are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What only grows, and begins anew with the programs or the agent.
    Counter,
    /// What goes up and down.
    Gauge,
    /// How often something took how long.
    Histogram,
    /// 1, with what does not change often in the labels.
    Info,
}

macro_rules! metrics {
    ($($(#[doc = $doc:literal])+ $metric:ident = $name:literal, $kind:ident [$($label:literal),*];)+) => {
        /// What is told, in the order of the output.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Metric {
            $($(#[doc = $doc])+ $metric,)+
        }

        impl Metric {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$metric),+];

            /// Its name; that of a counter ends in `_total`, that of an [`Info`](Kind::Info) in `_info`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$metric => $name,)+ }
            }

            /// How its values are read.
            pub const fn kind(self) -> Kind {
                match self { $(Self::$metric => Kind::$kind,)+ }
            }

            /// The names of its labels.
            pub const fn labels(self) -> &'static [&'static str] {
                match self { $(Self::$metric => &[$($label),*],)+ }
            }

            /// What it says, in one line.
            pub fn help(self) -> &'static str {
                match self { $(Self::$metric => concat!($($doc),+),)+ }.trim().trim_end_matches('.')
            }
        }
    };
}

metrics! {
    /// The program that tells these metrics: its version and the layout of its maps.
    BuildInfo = "flannel_build_info", Info ["version", "layout"];
    /// 1 where a source of these metrics could be read, 0 where what comes from it is missing.
    SourceUp = "flannel_metrics_source_up", Gauge ["source"];

    /// 1 where an agent serves the overlay.
    AgentUp = "flannel_agent_up", Gauge ["vni"];
    /// 1 while each of the agent's loops is heard, as /healthz says.
    AgentHealthy = "flannel_agent_healthy", Gauge [];
    /// 1 once the overlay is made, as /readyz says.
    AgentReady = "flannel_agent_ready", Gauge [];
    /// Agents that have no lease yet, and wait.
    AgentsWaiting = "flannel_agents_waiting", Gauge [];
    /// When the agent wrote its state; every ten seconds at the latest.
    StatusTimestamp = "flannel_status_timestamp_seconds", Gauge ["vni"];
    /// What the agent itself knows that `flannel-agent status` shows behind `look at`.
    Troubles = "flannel_troubles", Gauge ["vni"];
    /// What the overlay is.
    OverlayInfo = "flannel_overlay_info", Info ["vni", "backend", "network", "subnet", "public_ip", "interface", "xdp"];
    /// 1 where the network config in the store is not the one in use.
    ConfigDiffers = "flannel_config_differs", Gauge ["vni"];

    /// 1 for the state that this host's lease is in.
    LeaseState = "flannel_lease_state", Gauge ["vni", "state"];
    /// When this host's lease ends unless it is renewed; missing for one without a term.
    LeaseExpiry = "flannel_lease_expiry_timestamp_seconds", Gauge ["vni"];
    /// For how long a renewal keeps this host's lease; missing for one without a term.
    LeaseTerm = "flannel_lease_term_seconds", Gauge ["vni"];
    /// Renewals of this host's lease.
    LeaseRenewals = "flannel_lease_renewals_total", Counter ["vni"];
    /// How often this host's lease ended and another was taken.
    LeaseLosses = "flannel_lease_losses_total", Counter ["vni"];
    /// How often another host claimed this host's address and lease.
    LeaseClaims = "flannel_lease_claims_total", Counter ["vni"];

    /// 1 while the lease table in the store is followed.
    StoreUp = "flannel_store_up", Gauge ["vni"];
    /// Revision of the store at the last snapshot.
    StoreRevision = "flannel_store_revision", Gauge ["vni"];
    /// Changes that the store reported.
    StoreEvents = "flannel_store_events_total", Counter ["vni"];
    /// Snapshots of the lease table, by cause.
    StoreResyncs = "flannel_store_resyncs_total", Counter ["vni", "cause"];
    /// Entries in the store that are no usable leases.
    StoreEntriesPassedOver = "flannel_store_entries_passed_over", Gauge ["vni"];
    /// How often such an entry was seen.
    StorePassedOver = "flannel_store_passed_over_total", Counter ["vni"];
    /// From a change of the peers being seen in the store to its being in the maps. Removals that the guard waits with are not in it.
    Convergence = "flannel_convergence_seconds", Histogram ["vni"];

    /// Subnets that have a peer.
    Peers = "flannel_peers", Gauge ["vni"];
    /// The same by the state that `flannel-agent peers` shows; a silent one may have nothing to send.
    PeersByState = "flannel_peers_by_state", Gauge ["vni", "state"];
    /// Peers that are sent packets and do not answer, not even when the agent asks.
    PeersUnanswering = "flannel_peers_unanswering", Gauge ["vni"];
    /// Peers from which nothing has ever come.
    PeersNeverHeard = "flannel_peers_never_heard", Gauge ["vni"];
    /// When that peer was heard last which has been silent for longest, of those that were ever heard.
    PeersOldestHeard = "flannel_peers_oldest_heard_timestamp_seconds", Gauge ["vni"];
    /// Peers that the store no longer names and the guard keeps, by reason.
    PeersHeld = "flannel_peers_held", Gauge ["vni", "reason"];
    /// How often the guard kept a peer, by reason.
    PeersHeldEver = "flannel_peers_held_ever_total", Counter ["vni", "reason"];
    /// 1 for the state that a peer is in. Only with --metrics-per-peer.
    PeerState = "flannel_peer_state", Gauge ["vni", "subnet", "vtep", "state"];
    /// When a peer was heard last; missing where it never was. Only with --metrics-per-peer.
    PeerLastHeard = "flannel_peer_last_heard_timestamp_seconds", Gauge ["vni", "subnet", "vtep"];
    /// Pods' packets to and from a peer. Only with --metrics-per-peer.
    PeerPackets = "flannel_peer_packets_total", Counter ["vni", "subnet", "vtep", "direction"];
    /// Their bytes, of IPv4. Only with --metrics-per-peer.
    PeerBytes = "flannel_peer_bytes_total", Counter ["vni", "subnet", "vtep", "direction"];

    /// Packets by what became of them: the event, and whether it forwards, passes on or drops.
    Packets = "flannel_packets_total", Counter ["vni", "event", "outcome"];
    /// Bytes of these packets, from the Ethernet header on.
    Bytes = "flannel_bytes_total", Counter ["vni", "event", "outcome"];
    /// Packets that bypassed the host's stack.
    BypassPackets = "flannel_bypass_packets_total", Counter ["vni", "direction"];
    /// Flows that bypass the host's stack.
    Flows = "flannel_flows", Gauge ["vni", "direction", "kind"];
    /// What has to see each packet and keeps packets off the bypass, by kind.
    BypassRestrictions = "flannel_bypass_restrictions", Gauge ["vni", "kind"];
    /// Packets that went in at a place of this host while nothing came out of it; 0 where packets come out.
    LostPackets = "flannel_lost_packets", Gauge ["vni", "place"];

    /// Hooks by program, and whether the program is there.
    Hooks = "flannel_hooks", Gauge ["vni", "program", "state"];
    /// Time in a program. Only where the kernel has counted it (kernel.bpf_stats_enabled).
    ProgramRunSeconds = "flannel_program_run_seconds_total", Counter ["vni", "program"];
    /// How often a program ran. Only where the kernel has counted it.
    ProgramRuns = "flannel_program_runs_total", Counter ["vni", "program"];
    /// 1 where the packet rules are as they should be.
    PacketRulesSet = "flannel_packet_rules_set", Gauge ["vni"];
    /// How often another program had changed the packet rules.
    PacketRulesRepairs = "flannel_packet_rules_repairs_total", Counter ["vni"];
    /// What somebody else changed and was made right again, by what it was.
    Repairs = "flannel_repairs_total", Counter ["vni", "repair"];

    /// Connections in conntrack's table.
    ConntrackEntries = "flannel_conntrack_entries", Gauge [];
    /// How many fit; 0 for no limit.
    ConntrackLimit = "flannel_conntrack_entries_limit", Gauge [];
    /// CPU time of the agent.
    ProcessCpu = "process_cpu_seconds_total", Counter [];
    /// Resident memory of the agent.
    ProcessResident = "process_resident_memory_bytes", Gauge [];
    /// Open file descriptors of the agent.
    ProcessOpenFds = "process_open_fds", Gauge [];
    /// How many it may open.
    ProcessMaxFds = "process_max_fds", Gauge [];
    /// When the agent was started.
    ProcessStart = "process_start_time_seconds", Gauge [];
}

impl Metric {
    /// Whether it is told over HTTP only: by the agent itself, and of it.
    pub const fn is_of_process(self) -> bool {
        matches!(
            self,
            Self::AgentHealthy
                | Self::AgentReady
                | Self::ProcessCpu
                | Self::ProcessResident
                | Self::ProcessOpenFds
                | Self::ProcessMaxFds
                | Self::ProcessStart
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_name_is_as_its_kind_wants_it() {
        let names: BTreeSet<_> = Metric::ALL.iter().map(|metric| metric.name()).collect();
        assert_eq!(names.len(), Metric::ALL.len());
        for metric in Metric::ALL {
            let (name, kind) = (metric.name(), metric.kind());
            assert_eq!(name.ends_with("_total"), kind == Kind::Counter, "{name}");
            assert_eq!(name.ends_with("_info"), kind == Kind::Info, "{name}");
            // What is escaped in one format and not in the other.
            assert!(!metric.help().contains(['\\', '"', '\n']), "{name}");
        }
    }

    #[test]
    fn the_documentation_has_a_row_for_each() {
        let document = include_str!("../../../docs/metrics.md");
        let rows: Vec<_> = document.lines().filter(|line| line.starts_with("| `")).collect();
        let wanted: Vec<_> = Metric::ALL
            .iter()
            .map(|metric| {
                let kind = format!("{:?}", metric.kind()).to_lowercase();
                let labels: Vec<_> = metric.labels().iter().map(|label| format!("`{label}`")).collect();
                let over_http = if metric.is_of_process() { " Over HTTP only." } else { "" };
                format!("| `{}` | {kind} | {} | {}.{over_http} |", metric.name(), labels.join(", "), metric.help())
            })
            .collect();
        assert!(rows == wanted, "docs/metrics.md lacks these rows, in this order:\n{}", wanted.join("\n"));
    }
}
