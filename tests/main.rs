//! The dataplane on real packets: the loaded programs on frames of our own, and hosts in network namespaces with a
//! real etcd, judged by other people's tools. Everything here needs root, and fails without it.
//!
//! # Layout
//!
//! * [`world`] — a lab for a test, named hosts, the agent's binary
//! * [`frames`] — frames of the world, built with another's packet builder
//! * [`sockets`] — sockets in its namespaces, and bytes that tell where they belong
//! * [`calls`] — callers of servers, several at once, and what each must get
//! * [`stream`], [`numbered`] — numbered datagrams, and when each arrived; at a high rate, and which of them were lost
//! * [`counted`] — how counters grow meanwhile
//! * [`encapsulation`], [`admission`] — packet tables through the loaded programs; whole frames and all counters
//! * [`attacks`] — hostile packets through the programs and over wires, and who refuses each
//! * [`drops`] — what is dropped, by reason, and what it was
//! * [`fast_path`] — the same of flows that the programs know
//! * [`originals`] — and of what is left for them on the other side of the stack, where netfilter translates
//! * [`xdp`] — the same tables over a wire, with and without XDP
//! * [`model`] — the programs against a model of them; [`worlds`], [`inputs`] and [`comparison`] are shared with the fuzzer
//! * [`short_frames`] — the rest of those tables, sent through the attached programs
//! * [`two_hosts`] — pods talk, large sends stay whole, fragments pass, peers come, change and go
//! * [`large_packets`] — every size, whole or segmented, on small frames and large
//! * [`kernels`] — what differs from kernel to kernel, and the verifier's work on each
//! * [`api_server`] — the protocol of the Kubernetes store, on the double of its server
//! * [`kubernetes`] — leases from there
//! * [`certificates`] — TLS to the store
//! * [`etcd_roles`] — users and roles in the store
//! * [`bypass`] — flows past the host's stack, with netfilter's consent
//! * [`treated`] — what rules change in each packet, and the marks and priorities that they give it
//! * [`restricted`] — what a plan keeps off the bypass: pods, everything, a device's queue and its captures
//! * [`endings`] — flows whose connection or pod has ended
//! * [`helpers`] — connections that conntrack's helpers read
//! * [`overlays`] — worlds that differ in who carries the overlay
//! * [`alloc`] — a network without a datapath, and changing to it and back
//! * [`other_backends`] — leases of hosts with another backend
//! * [`networks`] — several networks on one host
//! * [`observers`] — queues, filters, programs and captures see each packet, as with flannel
//! * [`path_mtu`] — pods that believe in a larger MTU than the overlay has
//! * [`retransmissions`] — pods against hosts
//! * [`routers`] — pods that route on to something behind them
//! * [`senders`] — hosts' own addresses, what is behind hosts, and pod networks of class E
//! * [`services`] — service addresses and node ports, with kube-proxy's rules
//! * [`translated`] — who is who in flows that netfilter translates, when ports clash, servers change, sizes and paths do
//! * [`scenarios`] — by address, by name and by a host's port, from pods, hosts and outside
//! * [`netfilter`] — masquerading and forwarding, with nftables and with iptables
//! * [`firewalls`] — the same among rules of others that refuse, in either iptables, and with programs that fail
//! * [`network_policy`] — policies of Calico, kube-router and kube-network-policies, on live flows
//! * [`routes`] — which routes lead into the overlay, beside those of others; others' through it
//! * [`underlays`] — several links between hosts, and VTEP addresses on none of them
//! * [`stacked`] — bridges, VLANs, bonds, VRFs, tunnels without Ethernet headers between hosts
//! * [`routing_rules`] — routing rules that tunnel packets meet, followed or named
//! * [`rule_sets`] — these rules as others list them, and that nothing of them is left behind
//! * [`inspection`] — what others' rules do to each packet, found as they change, and done
//! * [`interoperation`] — with hosts of flannel's
//! * [`takeover`] — by flannel's daemon, of a host that nobody cleaned up
//! * [`leases`] — the protocol, with flannel's hosts in the same table
//! * [`tenancy`] — keeping the own lease: renewal, sleeping past its end, losing it
//! * [`duplicates`] — two hosts with one address
//! * [`guard`] — what a store that forgets can and can't do
//! * [`store_faults`] — etcd restarted, wiped, rolled back, compacted, full, without a leader, and away at the start
//! * [`lifecycle`] — what is made, what stays after the end, what cleanup takes away
//! * [`rollback`] — back to flannel's daemon under traffic, with and without cleanup, and a cleanup that comes late
//! * [`logs`] — the log as text, JSON and for the journal
//! * [`health`] — probes, and what the service manager is told
//! * [`metrics`] — what Prometheus is told, in its formats
//! * [`alerts`] — the alert rules, on what is planted
//! * [`page`] — the page to look at, in a [`browser`]
//! * [`schema`] — what is in the JSON that commands print
//! * [`troubleshooting`] — each command of that page, where its fault was planted
//! * [`status`] — what the operator is shown of the dataplane
//! * [`trace`] — what becomes of a packet, said beforehand
//! * [`capture`] — what the overlay carries, in a file
//! * [`audit`] — how many objects the kernel has, whatever the number of peers
//! * [`bundle`] — what support is given, and what not
//! * [`commands`] — what the agent goes by: config, version, lease, manuals
//! * [`condition`] — an agent that does not answer; status as a probe
//! * [`doctor`] — what stands in the overlay's way, each fault planted
//! * [`chaos`] — all of that at once for a moment, with what must hold checked throughout
//! * [`restart`] — crashes and restarts under them
//! * [`upgrade`] — to other programs, to another map layout, and back; pins that can't be adopted
//! * [`privileges`] — an ordinary user with two capabilities; files, symbolic links, hostile text
//! * [`drift`], [`drift_external`] — what somebody else changes on a host while pods talk
//! * [`addresses`] — addresses and interfaces that move, and which of a host's addresses it goes by
//! * [`cni`] — the CNI plugin, run as a runtime runs it
//! * [`udp`] — the tunnel of the backend udp: its wire, its senders, the daemon that drives it, what stands in its way
//! * [`machines`] — the package and its unit, on hosts that systemd runs
//! * [`docker_opts`] — Docker's options
//! * [`docker`] — Docker Engines with these, and their containers
//! * [`flags`] — flags, variables and shared files as flannel takes them, with its own process
//! * [`bad_input`] — one line for each, and nothing half-made

mod addresses;
mod admission;
mod alerts;
mod alloc;
mod api_server;
mod attacks;
mod audit;
mod bad_input;
mod browser;
mod bundle;
mod bypass;
mod calls;
mod capture;
mod certificates;
mod chaos;
mod cni;
mod commands;
#[path = "fuzz/comparison.rs"]
mod comparison;
mod condition;
mod counted;
mod direct_routing;
mod docker;
mod docker_opts;
mod doctor;
mod drift;
mod drift_external;
mod drops;
mod duplicates;
mod encapsulation;
mod endings;
mod etcd_roles;
mod evidence;
mod fast_path;
mod firewalls;
mod flags;
mod frames;
mod guard;
mod health;
mod helpers;
mod host_gw;
#[path = "fuzz/inputs.rs"]
mod inputs;
mod inspection;
mod interoperation;
mod kernels;
mod kubernetes;
mod large_packets;
mod leases;
mod lifecycle;
mod loaded;
mod logs;
mod machines;
mod metrics;
mod model;
mod netfilter;
mod network_policy;
mod networks;
mod numbered;
mod observers;
mod originals;
mod other_backends;
mod overlays;
mod page;
mod path_mtu;
mod peers;
mod ping;
mod privileges;
mod restart;
mod restricted;
mod retransmissions;
mod rollback;
mod routers;
mod routes;
mod routing_rules;
mod rule_sets;
mod scenarios;
mod schema;
mod senders;
mod services;
mod short_frames;
mod sockets;
mod stacked;
mod status;
mod store_faults;
mod stream;
mod takeover;
mod tenancy;
mod trace;
mod translated;
mod treated;
mod troubleshooting;
mod tunnel_rules;
mod two_hosts;
mod udp;
mod underlays;
mod upgrade;
mod world;
#[path = "fuzz/worlds.rs"]
mod worlds;
mod xdp;
