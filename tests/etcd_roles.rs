//! etcd with users: a role that may do what flannel's may is enough, and where it may not, the missing permission is
//! named.

use xtask::lab::PREFIX;

use crate::world::{CONFIG, World, lease_value};

const ROOT: &str = "--user=root:secret";
const FLAGS: [&str; 3] = ["--etcd-username=flannel", "--etcd-password=word", "--subnet-lease-ttl=6"];

fn root(world: &World, arguments: &[&str]) -> String {
    world.store.etcdctl(&[&[ROOT], arguments].concat()).unwrap()
}

fn put_peer(world: &World, octet: u8) {
    let value = lease_value(&format!("192.168.64.{octet}"), &format!("0a:00:00:00:00:{octet:x}"));
    root(world, &["put", &format!("{PREFIX}/subnets/10.5.{octet}.0-24"), &value]);
}

/// Has etcd ask for users, with one that has the role that docs/etcd.md describes.
fn with_roles(world: &World) {
    let (config, subnets) = (format!("{PREFIX}/config"), format!("{PREFIX}/subnets"));
    for command in [
        &["user", "add", "root:secret"][..],
        &["user", "grant-role", "root", "root"],
        &["role", "add", "flannel"],
        &["role", "grant-permission", "flannel", "read", &config],
        &["role", "grant-permission", "flannel", "--prefix=true", "readwrite", &subnets],
        &["user", "add", "flannel:word"],
        &["user", "grant-role", "flannel", "flannel"],
        &["auth", "enable"],
    ] {
        world.store.etcdctl(command).unwrap();
    }
}

#[test]
fn a_role_for_flannels_keys_is_enough() {
    let mut world = World::new(1);
    with_roles(&world);
    world.start(0, &FLAGS);
    world.hosts[0].wait_ready().unwrap();
    world.wait_status(0, "to be followed", |status| status["store"]["following"] == true);
    // Changes of the leases and of the config are both seen, and renewals go on.
    put_peer(&world, 200);
    world.wait_status(0, "a peer", |status| status["peers"] == 1);
    let config = format!("{PREFIX}/config");
    root(&world, &["put", &config, &CONFIG.replace("191", "190")]);
    world.wait_status(0, "the change", |status| {
        status["configDiffers"].as_str().is_some_and(|differs| differs.contains("10.5.190.0"))
    });
    root(&world, &["put", &config, CONFIG]);
    world.wait_status(0, "the old config", |status| status["configDiffers"].is_null());
    world.wait_status(0, "renewals", |status| status["lease"]["renewals"].as_u64().unwrap() > 1);

    // A gap in the changes of one is one of both.
    let resyncs = |world: &World| world.status(0)["status"]["store"]["resyncs"]["connection"].as_u64().unwrap_or(0);
    let before = resyncs(&world);
    world.store.kill().unwrap();
    world.store.resume().unwrap();
    world.wait_status(0, "a snapshot", |status| {
        status["store"]["resyncs"]["connection"].as_u64().is_some_and(|count| count > before)
            && status["store"]["following"] == true
    });
    root(&world, &["del", &format!("{PREFIX}/subnets/10.5.200.0-24")]);
    world.wait_status(0, "no peer", |status| status["peers"] == 0);
}

#[test]
fn a_missing_permission_is_named_and_heals_when_granted() {
    let mut world = World::new(1);
    with_roles(&world);
    let (config, subnets) = (format!("{PREFIX}/config"), format!("{PREFIX}/subnets"));
    let grant_config = ["role", "grant-permission", "flannel", "read", &config];
    let grant_subnets = ["role", "grant-permission", "flannel", "--prefix=true", "readwrite", &subnets];
    let may_not_read = format!(
        "permission denied: the user flannel may not read {config}; `etcdctl role grant-permission ROLE read {config}`"
    );
    let may_not_write = format!(
        "permission denied: the user flannel may not read and write {subnets}; \
         `etcdctl role grant-permission ROLE --prefix=true readwrite {subnets}`"
    );
    root(&world, &["role", "revoke-permission", "flannel", &config]);
    root(&world, &["role", "revoke-permission", "flannel", "--prefix=true", &subnets]);
    // Without a user, and with a wrong password.
    world.start(0, &[]);
    world.wait_log(0, "etcd asks for a user and a password; give them with --etcd-username and --etcd-password");
    world.start(0, &["--etcd-username=flannel", "--etcd-password=other"]);
    world.wait_log(0, "etcd does not know the user flannel with this password; check --etcd-username");
    world.start(0, &FLAGS);
    world.wait_log(0, &may_not_read);
    root(&world, &grant_config);
    world.wait_log(0, &may_not_write);
    world.assert_untouched(0);
    root(&world, &grant_subnets);
    world.hosts[0].wait_ready().unwrap();
    world.wait_status(0, "the lease", |status| {
        status["lease"]["state"] == "held" && status["store"]["following"] == true
    });

    // Taken away while the agent runs: renewals say so, and nothing else happens.
    world.start(0, &FLAGS);
    world.wait_status(0, "the lease", |status| {
        status["lease"]["state"] == "held" && status["store"]["following"] == true
    });
    root(&world, &["role", "revoke-permission", "flannel", "--prefix=true", &subnets]);
    world.wait_log(0, &may_not_write);
    root(&world, &grant_subnets);
    let renewals = world.status(0)["status"]["lease"]["renewals"].as_u64().unwrap();
    world.wait_status(0, "renewals again", |status| {
        status["lease"]["state"] == "held" && status["lease"]["renewals"].as_u64().unwrap() > renewals
    });
    assert_eq!(world.status(0)["status"]["lease"]["losses"], 0);
}

#[test]
fn user_and_password_are_for_when_etcd_asks() {
    let mut world = World::new(1);
    world.start(0, &FLAGS);
    world.hosts[0].wait_ready().unwrap();
    world.wait_status(0, "to be followed", |status| status["store"]["following"] == true);
    // Asked for while the agent runs.
    with_roles(&world);
    let renewals = world.status(0)["status"]["lease"]["renewals"].as_u64().unwrap();
    world.wait_status(0, "renewals", |status| {
        status["lease"]["state"] == "held" && status["lease"]["renewals"].as_u64().unwrap() > renewals + 1
    });
    put_peer(&world, 200);
    world.wait_status(0, "a peer", |status| status["peers"] == 1);
}
