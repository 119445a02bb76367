//! The agent: leases a subnet for this host's pods and keeps dataplane, kernel and lease table in step.
//!
//! # Layout
//!
//! * [`cli`] — flags, variables, exit codes
//! * [`daemon`] — the life of the daemon: wait for the store, set up, follow changes
//! * [`privileges`] — what the process may do
//! * [`escape`] — text from elsewhere, for logs and terminals
//! * [`preflight`] — what the host must have
//! * [`lock`] — one agent for each overlay of a host
//! * [`config`] — the network configuration and its rules
//! * [`lease`] — keys, values, allocation, the table of peers with its guard; pure
//! * [`registry`] — the lease table in the store; the only room that speaks to it
//! * [`device`] — links, routes, neighbours; the only room that speaks netlink
//! * [`conntrack`] — connection tracking: its patience with flows that it sees little of, and when they end
//! * [`netfilter`] — packet rules: masquerading and forwarding; the only room that runs `nft` and `iptables`
//! * [`inspection`] — what others' packet rules do to each packet
//! * [`dataplane`] — programs, maps, pins; the only room that speaks to aya
//! * [`xdp`] — whether XDP takes packets out of the tunnel, and why
//! * [`udp`] — the tunnel of the backend udp, in user space
//! * [`routes`] — which routes lead into the overlay, and why; pure
//! * [`underlay`] — which way each peer is reached; from lease table and kernel to what the maps should say
//! * [`backend`] — how packets get to the other hosts: its device, its MTU, what leases announce, the way to a peer
//! * [`last_known`] — what was last known of the store, for when it is away
//! * [`waiting`] — what it waits for before it has an overlay
//! * [`histogram`] — how often something took how long
//! * [`status`] — what the agent says of itself; [`operator`] — the commands that read it; [`control`] — what can be asked
//! * [`health`] — whether it is alive and ready, for probes and the service manager
//! * [`page`] — a page to look at, for operators; [`shared_reading`] — what is read for who asks over HTTP
//! * [`atomic_file`] — files that others read; [`sysctl`] — settings of the kernel
//! * [`subnet_env`] — what container runtimes are told
//! * [`ownership`] — whether that file is still the agent's own
//! * [`docker_opts`] — Docker's options from it
//! * [`cni`] — the CNI plugin, a program of its own that uses none of the rooms that run asynchronously
//! * [`bypass`] — what keeps packets off the bypass
//! * [`cleanup`] — taking all of it away again
//! * [`go_values`] — values as Go reads them; [`suggestion`] — what a misspelt name may mean
//! * [`repair`] — what somebody else changed and the agent made right again
//! * [`retry`] — back-off
//!
//! The daemon decides, by what the `backend` offers; `lease` and `underlay` calculate, and `registry`, `device` and
//! `dataplane` act. What is in the maps is compared with what should be there on every event and every few seconds, so
//! that nothing is handled once and lost.

pub mod atomic_file;
pub mod backend;
pub mod bypass;
pub mod cleanup;
pub mod cli;
pub mod cni;
pub mod config;
pub mod conntrack;
pub mod control;
pub mod daemon;
pub mod dataplane;
pub mod device;
pub mod docker_opts;
pub mod escape;
pub mod evidence;
pub mod go_values;
pub mod health;
pub mod histogram;
pub mod inspection;
pub mod last_known;
pub mod lease;
pub mod lock;
pub mod log;
pub mod netfilter;
pub mod operator;
pub mod ownership;
pub mod page;
mod plural;
pub mod preflight;
pub mod privileges;
pub mod probe;
pub mod registry;
pub mod repair;
pub mod retry;
pub mod routes;
pub mod shared_reading;
pub mod status;
pub mod subnet_env;
pub mod suggestion;
pub mod sysctl;
pub mod udp;
pub mod underlay;
pub mod waiting;
pub mod xdp;
