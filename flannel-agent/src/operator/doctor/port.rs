//! The tunnel's UDP port: who has it.

use std::{fs, path::Path};

use super::{
    Check,
    facts::{Host, Overlay},
};
use crate::config::BackendType;

const NAME: &str = "UDP port";
/// Sockets of this network namespace.
const SOCKETS: [&str; 2] = ["/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"];

pub(super) async fn checks(host: &Host<'_>) -> Vec<Check> {
    let mut checks = Vec::new();
    for overlay in &host.overlays {
        let Some(port) = overlay.port else { continue };
        let displacing = match overlay.vxlan_device() {
            Some(device) => host.netlink.displacing(&device).await.unwrap_or_default(),
            None => None,
        };
        let ports = host.netlink.vxlan_ports().await.unwrap_or_default();
        let devices: Vec<_> = ports.into_iter().filter(|(_, of)| *of == port).map(|(name, _)| name).collect();
        let sockets: Vec<u64> =
            SOCKETS.iter().flat_map(|path| inodes(&fs::read_to_string(path).unwrap_or_default(), port)).collect();
        let owner = sockets.iter().find_map(|inode| owner(*inode));
        checks.push(judge(overlay, port, displacing.as_deref(), &devices, !sockets.is_empty(), owner.as_ref()));
    }
    checks
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Process {
    pid: u32,
    name: String,
}

fn judge(
    overlay: &Overlay,
    port: u16,
    displacing: Option<&str>,
    devices: &[String],
    is_bound: bool,
    owner: Option<&Process>,
) -> Check {
    if let Some(other) = displacing {
        return Check::problem(
            NAME,
            format!(
                "the vxlan device {other} has {port}, with the same VNI or with settings that can't be had beside ours"
            ),
            format!("remove it with `ip link delete {other}`, or give this network another VNI or Port in its config"),
        );
    }
    let own = overlay.status.as_ref().map(|status| status.pid);
    match owner {
        Some(Process { pid, .. }) if own == Some(*pid) && overlay.backend == BackendType::Udp => {
            Check::ok(NAME, format!("{port} is the agent's"))
        }
        Some(Process { pid, name }) => Check::problem(
            NAME,
            format!("{port} is taken by {name} (process {pid})"),
            "end that, or give this network another Port in its config, on all hosts",
        ),
        None if !devices.is_empty() => Check::ok(NAME, format!("{port} is that of {}", devices.join(", "))),
        None if is_bound => Check::warning(
            NAME,
            format!("{port} is taken, by whom can't be seen: the kernel, or a process that is not this user's"),
            "run doctor as root, and look at `ss -ulnp`",
        ),
        None => Check::ok(NAME, format!("{port} is free")),
    }
}

/// The inodes of sockets that are bound to a port (net/ipv4/udp.c, `udp4_format_sock`).
fn inodes(table: &str, port: u16) -> Vec<u64> {
    const LOCAL: usize = 1;
    const INODE: usize = 9;
    let suffix = format!(":{port:04X}");
    let row = |line: &str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.get(LOCAL)?.ends_with(&suffix).then(|| fields.get(INODE)?.parse().ok())?
    };
    table.lines().skip(1).filter_map(row).collect()
}

/// Who has a socket. [`None`] for the kernel, and where it can't be seen.
fn owner(inode: u64) -> Option<Process> {
    let socket = format!("socket:[{inode}]");
    let processes = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let has = |pid: &u32| {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        files.into_iter().any(|file| fs::read_link(file.path()).is_ok_and(|target| target == Path::new(&socket)))
    };
    let pid = processes.into_iter().find(has)?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(Process { pid, name: name.trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_found_by_their_port() {
        let table = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n \
             10: 00000000:2118 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4711 2 0000000000000000 0\n \
             11: 0100007F:0035 00000000:2118 07 00000000:00000000 00:00000000 00000000     0        0 4712 2 0000000000000000 0\n";
        assert_eq!(inodes(table, 8472), [4711]);
        assert_eq!(inodes(table, 53), [4712]);
        assert_eq!(inodes(table, 8473), [0; 0]);
        assert_eq!(inodes("", 8472), [0; 0]);
    }

    #[test]
    fn the_owner_of_a_socket_is_found() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let found = inodes(&fs::read_to_string(SOCKETS[0]).unwrap(), port);
        let owner = found.iter().find_map(|inode| owner(*inode)).unwrap();
        assert_eq!(owner.pid, std::process::id());
    }
}
