//! What a machine is asked, and what it answers: a line of JSON each, by a serial port.

use std::net::SocketAddrV4;

use serde::{Deserialize, Serialize};

/// Where a command is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Place {
    /// In the machine's own network namespace.
    Host,
    /// In the pod's.
    Pod,
}

/// What a machine is asked to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Request {
    /// Run a command line, words divided by spaces, to its end; the answer is what it printed.
    Exec(Place, String),
    /// Run a command of the agent's; the answer is what it printed, whether it found something to look at or not.
    Agent(String),
    /// Start the agent, or end it and start it anew, with these arguments.
    StartAgent(String),
    /// The answer is what the agent said.
    AgentLog,
    /// Start etcd, with what it knew before.
    StartStore,
    /// End it.
    StopStore,
    /// Write a key into it.
    Put(String, String),
    /// Make the pod, which echoes what comes to a port of it; the answer is its address.
    AddPod(u16),
    /// Have netfilter translate a service's address to that of a pod, as kube-proxy does.
    Service(SocketAddrV4, SocketAddrV4),
    /// Have the pod send so many bytes by TCP to a pod that echoes, and take them back; the answer is how fast it was.
    Tcp(SocketAddrV4, usize),
    /// Have the pod send so many datagrams of a size, one after the other, each of which must come back.
    Udp(SocketAddrV4, usize, usize),
    /// End at once, as if somebody had pulled the plug. There is no answer.
    Reset,
}

/// Its answer, or what went wrong.
pub(super) type Answer = Result<String, String>;
