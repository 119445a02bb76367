//! Docker's own unit with the package's drop-in: what dockerd is started with. In its place is a script; Docker itself with
//! these options is looked at elsewhere. The agent has the backend udp here, for which its unit lets it have a TUN device.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use xtask::{lab::PREFIX, progress::wait_for};

use super::{install, machine::Machine, tell_store};
use crate::world::{SOON, World};

const UNITS: &str = "/usr/lib/systemd/system";
const EXAMPLE: &str = "/usr/share/doc/flannel-agent/examples/docker-flannel.conf";
const DROP_INS: &str = "/etc/systemd/system/docker.service.d";
const SCRIPT: &str = "#!/bin/sh\necho \"$@\" >> /run/dockerd.arguments\nexec sleep infinity\n";

#[test]
fn docker_starts_with_the_subnet_of_its_host() {
    let world = World::without_config(1);
    let config = r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "udp"}}"#;
    world.store.put(&format!("{PREFIX}/config"), config).unwrap();
    let machine = Machine::boot(&world.hosts[0]);
    install(&machine);
    tell_store(&machine, &world);
    let subnet = machine.subnet_for(&world.hosts[0]);

    for unit in ["docker.service", "docker.socket"] {
        fs::copy(Path::new(UNITS).join(unit), machine.path(UNITS).join(unit)).unwrap();
    }
    fs::create_dir_all(machine.path(DROP_INS)).unwrap();
    fs::copy(machine.path(EXAMPLE), machine.path(DROP_INS).join("flannel.conf")).unwrap();
    // A script has nothing to say to systemd.
    fs::write(machine.path(DROP_INS).join("script.conf"), "[Service]\nType=exec\n").unwrap();
    fs::write(machine.path("/etc/default/docker"), "DOCKER_OPTS=--debug\n").unwrap();
    let dockerd = machine.path("/usr/sbin/dockerd");
    fs::remove_file(&dockerd).unwrap();
    fs::write(&dockerd, SCRIPT).unwrap();
    fs::set_permissions(&dockerd, fs::Permissions::from_mode(0o755)).unwrap();
    machine.run("systemctl daemon-reload");
    for _ in 0..2 {
        machine.run("systemctl restart docker.service");
    }
    let arguments = || fs::read_to_string(machine.path("/run/dockerd.arguments")).unwrap_or_default();
    wait_for("the second start", SOON, || arguments().lines().count() == 2).unwrap();
    let expected = format!(
        "-H fd:// --containerd=/run/containerd/containerd.sock --debug --bip={}/{} --ip-masq=true --mtu={}",
        subnet.gateway, subnet.len, subnet.mtu
    );
    for line in arguments().lines() {
        assert_eq!(line, expected);
    }
}
