//! `flannel-agent docker-opts`: what Docker's unit reads.

use std::{fs, os::unix::fs::PermissionsExt as _};

use crate::world::World;

#[test]
fn written_from_the_agents_subnet_env() {
    let mut world = World::new(1);
    world.start(0, &[]);
    let gateway = world.hosts[0].wait_ready().unwrap().gateway;
    let host = &world.hosts[0];
    let (env, file) = (host.run_dir().join("subnet.env"), host.run_dir().join("docker_opts.env"));
    let run = |options: &[&str]| {
        let mut command = world.agent_on(0);
        command.args(["docker-opts", "-f"]).arg(&env).arg("-d").arg(&file).args(options);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(run(&[]), (Some(0), String::new()));
    let options = format!(" --bip={gateway}/24 --ip-masq=true --mtu=1450\"\n");
    let golden = format!(
        "DOCKER_OPT_BIP=\"--bip={gateway}/24\"\nDOCKER_OPT_IPMASQ=\"--ip-masq=true\"\nDOCKER_OPT_MTU=\"--mtu=1450\"\n"
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), format!("{golden}DOCKER_OPTS=\"{options}"));
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644);
    assert_eq!(run(&["-c", "-k", "DOCKER_NETWORK_OPTIONS"]).0, Some(0));
    assert_eq!(fs::read_to_string(&file).unwrap(), format!("DOCKER_NETWORK_OPTIONS=\"{options}"));

    // Somebody routes the subnet elsewhere: said after the file is written, as by the script.
    fs::remove_file(&file).unwrap();
    let [a, b, c, _] = gateway.octets();
    host.netns.ip(&format!("route add {a}.{b}.{c}.0/24 via 192.168.64.254")).unwrap();
    let (code, said) = run(&["-i"]);
    let words = format!("Your routing table already contains the subnet: {a}.{b}.{c}.0/24 via 192.168.64.254 dev eth0");
    assert!(code == Some(1) && said.contains(&words), "{code:?} {said}");
    assert_eq!(fs::read_to_string(&file).unwrap(), golden);
    host.netns.ip(&format!("route del {a}.{b}.{c}.0/24 via 192.168.64.254")).unwrap();

    // What can't be understood leaves the file as it was.
    fs::write(&env, "FLANNEL_IPMASQ=maybe\n").unwrap();
    let (code, said) = run(&[]);
    assert!(code == Some(1) && said.contains("Invalid value of FLANNEL_IPMASQ: maybe"), "{code:?} {said}");
    assert_eq!(fs::read_to_string(&file).unwrap(), golden);
    // Nothing to say is no error.
    fs::remove_file(&env).unwrap();
    assert_eq!(run(&[]).0, Some(0));
    assert_eq!(fs::read_to_string(&file).unwrap(), "DOCKER_OPTS=\"\"\n");
    assert_eq!(run(&["-x"]).0, Some(2));
}
