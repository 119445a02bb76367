//! TLS to the store: authorities and certificates that are right, wrong, expired, missing, and replaced under way.

use std::{fs, path::Path, process::Command};

use xtask::{lab::Store, process::output};

use crate::{bad_input::end_of, world::World};

/// An authority, and certificates that it signed: for the server, for a client, and one that has expired.
struct Certificates<'a>(&'a Path);

impl Certificates<'_> {
    fn make(&self, name: &str) {
        let curve = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
        let script = format!(
            "openssl req -x509 {curve} -days 2 -subj /CN={name}-ca -keyout {name}-ca.key -out {name}-ca.pem && \
             printf 'subjectAltName=IP:192.168.64.254\\nbasicConstraints=CA:FALSE\\n' > ext && \
             for who in server client expired; do \
               openssl req {curve} -subj /CN=$who -keyout {name}-$who.key -out csr && \
               openssl x509 -req -days $([ $who = expired ] && echo -1 || echo 1) -in csr -CA {name}-ca.pem -CAkey {name}-ca.key -CAcreateserial -extfile ext \
                 -out {name}-$who.pem || exit 1; \
             done"
        );
        output(Command::new("sh").current_dir(self.0).args(["-c", &script])).unwrap();
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    /// Starts a server with a certificate. Where an authority is named, it wants one of its clients.
    fn server(&self, world: &World, certificate: &str, authority: Option<&str>) -> Store {
        let (certificate, key) = (self.path(&format!("{certificate}.pem")), self.path(&format!("{certificate}.key")));
        let mut arguments = vec!["--cert-file", &certificate, "--key-file", &key];
        let authority = authority.map(|authority| self.path(&format!("{authority}-ca.pem")));
        if let Some(authority) = &authority {
            arguments.extend(["--client-cert-auth", "--trusted-ca-file", authority]);
        }
        let url = "https://192.168.64.254:2379";
        Store::start_with(&world.lab.underlay, url, world.lab.directory(), &arguments).unwrap()
    }
}

#[test]
fn certificates_of_clients_are_given_replaced_and_expired() {
    let mut world = World::new(1);
    let directory = world.lab.directory().join("tls");
    fs::create_dir(&directory).unwrap();
    let certificates = Certificates(&directory);
    certificates.make("old");
    certificates.make("new");
    world.store.stop();
    world.store = certificates.server(&world, "old-server", Some("old"));
    let used = ["ca.pem", "client.pem", "client.key"];
    let install = |from: [&str; 3]| {
        for (from, to) in from.iter().zip(used) {
            fs::copy(directory.join(from), directory.join(to)).unwrap();
        }
    };
    let flags = [
        format!("--etcd-cafile={}", certificates.path("ca.pem")),
        format!("--etcd-certfile={}", certificates.path("client.pem")),
        format!("--etcd-keyfile={}", certificates.path("client.key")),
    ];
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();

    // Without a certificate, and with one that has expired: refused, said, waited out.
    install(["old-ca.pem", "old-client.pem", "old-client.key"]);
    world.start(0, &flags[..1]);
    world.wait_log(0, "check that the endpoint speaks TLS, and --etcd-cafile, --etcd-certfile and --etcd-keyfile");
    install(["old-ca.pem", "old-expired.pem", "old-expired.key"]);
    world.start(0, &flags);
    world.wait_log(0, "check that the endpoint speaks TLS, and --etcd-cafile, --etcd-certfile and --etcd-keyfile");
    world.assert_untouched(0);
    // Replaced under the agent's hands, it goes on.
    install(["old-ca.pem", "old-client.pem", "old-client.key"]);
    world.hosts[0].wait_ready().unwrap();
    world.wait_status(0, "to be followed", |status| status["store"]["following"] == true);

    // The cluster moves to another authority; the files are replaced while the agent runs.
    world.store.stop();
    install(["new-ca.pem", "new-client.pem", "new-client.key"]);
    world.store = certificates.server(&world, "new-server", Some("new"));
    world.wait_resync(0, "connection");
    // A server whose certificate has expired is not believed.
    world.store.stop();
    world.store = certificates.server(&world, "new-expired", Some("new"));
    world.wait_status(0, "the expiry", |status| {
        status["store"]["following"] == false
            && status["store"]["problem"].as_str().is_some_and(|problem| problem.to_lowercase().contains("expired"))
    });
}

#[test]
fn the_authority_alone_is_enough_and_has_to_be_the_right_one() {
    let mut world = World::new(1);
    let directory = world.lab.directory().join("tls");
    fs::create_dir(&directory).unwrap();
    let certificates = Certificates(&directory);
    certificates.make("right");
    certificates.make("wrong");
    world.store.stop();
    world.store = certificates.server(&world, "right-server", None);

    world.start(0, &[&format!("--etcd-cafile={}", certificates.path("wrong-ca.pem"))]);
    world.wait_log(0, "check that the endpoint speaks TLS, and --etcd-cafile");
    world.assert_untouched(0);
    world.start(0, &[&format!("--etcd-cafile={}", certificates.path("absent.pem"))]);
    let (code, line) = end_of(&mut world, 0);
    assert_eq!(code, Some(78), "{line}");
    assert!(line.contains("absent.pem: No such file or directory"), "{line}");
    // flannel would go on without TLS.
    world.start(0, &[&format!("--etcd-cafile={}", certificates.path("right-ca.pem"))]);
    world.hosts[0].wait_ready().unwrap();
}
