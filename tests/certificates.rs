//! TLS to the store: the certificates that Go takes, and those that are wrong, expired, missing, and replaced under way.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpListener,
    path::Path,
    process::Command,
};

use xtask::{
    lab::Store,
    process::{Process, output},
};

use crate::{bad_input::end_of, world::World};

const URL: &str = "https://192.168.64.254:2379";
/// What an agent says that has read the store, which has no config here.
const CONNECTED: &str = "flannel config not found in etcd store";

/// Runs a script that makes certificates.
fn make(directory: &Path, script: &str) {
    output(Command::new("sh").current_dir(directory).args(["-ec", script])).unwrap();
}

/// An authority, and certificates that it signed: for the server, for a client, and ones that have expired, or are not
/// for clients.
struct Certificates<'a>(&'a Path);

impl Certificates<'_> {
    fn make(&self, name: &str) {
        let curve = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
        let script = format!(
            "openssl req -x509 {curve} -days 2 -subj /CN={name}-ca -keyout {name}-ca.key -out {name}-ca.pem
             printf '[ca]\ndefault_ca=d\n[d]\ndatabase=db\nnew_certs_dir=.\nserial=serial\ndefault_md=sha256\n' > ca.cnf
             printf 'policy=p\nx509_extensions=e\n[p]\ncommonName=supplied\n[e]\n' >> ca.cnf
             printf 'subjectAltName=IP:192.168.64.254\nbasicConstraints=CA:FALSE\n' >> ca.cnf
             echo 01 > serial; : > db
             sign() {{
               openssl req {curve} -subj /CN=$1 -keyout {name}-$1.key -out csr
               openssl ca -batch -config ca.cnf -cert {name}-ca.pem -keyfile {name}-ca.key -notext -in csr \
                 -out {name}-$1.pem -startdate 20200101000000Z -enddate $2
             }}
             sign server 20491231000000Z
             sign client 20491231000000Z
             sign expired 20210101000000Z
             echo extendedKeyUsage=serverAuth >> ca.cnf
             sign unfit 20491231000000Z"
        );
        make(self.0, &script);
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    /// Starts a server with a certificate. Where an authority is named, it wants one of its clients.
    fn server(&self, world: &World, certificate: &str, authority: Option<&str>) -> Store {
        let (certificate, key) = (self.path(&format!("{certificate}.pem")), self.path(&format!("{certificate}.key")));
        let mut arguments = vec!["--cert-file", &certificate, "--key-file", &key];
        let authority = authority.map(|authority| self.path(&format!("{authority}.pem")));
        if let Some(authority) = &authority {
            arguments.extend(["--client-cert-auth", "--trusted-ca-file", authority]);
        }
        Store::start_with(&world.lab.underlay, URL, world.lab.directory(), &arguments).unwrap()
    }

    /// Flags for an authority, and an identity.
    fn flags(&self, authority: &str, identity: Option<&str>) -> Vec<String> {
        let mut flags = vec![format!("--etcd-cafile={}", self.path(&format!("{authority}.pem")))];
        if let Some(name) = identity {
            flags.push(format!("--etcd-certfile={}", self.path(&format!("{name}.pem"))));
            flags.push(format!("--etcd-keyfile={}", self.path(&format!("{name}.key"))));
        }
        flags
    }
}

fn start(world: &mut World, flags: &[String]) {
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    world.start(0, &flags);
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
    world.store = certificates.server(&world, "old-server", Some("old-ca"));
    let install = |from: [&str; 3]| {
        for (from, to) in from.iter().zip(["ca.pem", "client.pem", "client.key"]) {
            fs::copy(directory.join(from), directory.join(to)).unwrap();
        }
    };

    // Each refusal says what about which certificate it is.
    for (identity, text) in [
        (None, "it wants a client certificate, and none is given; give one with --etcd-certfile and --etcd-keyfile"),
        (Some("new-client"), "it refuses this client's certificate (CN=client)"),
        (Some("new-client"), "it is signed by CN=new-ca: does etcd's --trusted-ca-file have it?"),
        (Some("old-unfit"), "it lacks clientAuth in its extendedKeyUsage"),
    ] {
        start(&mut world, &certificates.flags("old-ca", identity));
        world.wait_log(0, text);
    }
    install(["old-ca.pem", "old-expired.pem", "old-expired.key"]);
    start(&mut world, &certificates.flags("ca", Some("client")));
    world.wait_log(0, "it refuses this client's certificate (CN=expired)");
    world.wait_log(0, "it expired on 2021-01-01 00:00:00 UTC");
    world.assert_untouched(0);
    // Replaced under the agent's hands, it goes on.
    install(["old-ca.pem", "old-client.pem", "old-client.key"]);
    world.hosts[0].wait_ready().unwrap();
    world.wait_status(0, "to be followed", |status| status["store"]["following"] == true);

    // The cluster moves to another authority; the files are replaced while the agent runs.
    world.store.stop();
    install(["new-ca.pem", "new-client.pem", "new-client.key"]);
    world.store = certificates.server(&world, "new-server", Some("new-ca"));
    world.wait_resync(0, "connection");
    // A server whose certificate has expired is not believed.
    world.store.stop();
    world.store = certificates.server(&world, "new-expired", Some("new-ca"));
    world.wait_status(0, "the expiry", |status| {
        status["store"]["following"] == false
            && status["store"]["problem"]
                .as_str()
                .is_some_and(|problem| problem.contains("its certificate (CN=expired) expired on 2021-01-01"))
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

    start(&mut world, &certificates.flags("wrong-ca", None));
    world.wait_log(0, "its certificate (CN=server) is signed by CN=right-ca, which is not in");
    world.assert_untouched(0);
    // Files that can't be used end it, with the reason.
    make(
        &directory,
        "cp right-client.pem locked.pem
         openssl pkey -in right-client.key -aes128 -passout pass:x -out locked.key
         cp right-client.pem crossed.pem
         cp wrong-client.key crossed.key
         openssl x509 -in right-ca.pem -outform DER -out binary.pem",
    );
    for (authority, identity, text) in [
        ("absent", None, "absent.pem: No such file or directory"),
        ("binary", None, "binary.pem: no certificate is in it in PEM"),
        ("right-ca", Some("locked"), "locked.key: the key is encrypted; decrypt it with `openssl pkey`"),
        ("right-ca", Some("crossed"), "crossed.key: the key is not that of the certificate in"),
    ] {
        start(&mut world, &certificates.flags(authority, identity));
        let (code, line) = end_of(&mut world, 0);
        assert_eq!(code, Some(78), "{line}");
        assert!(line.contains(text), "{line}");
    }
    // flannel would go on without TLS.
    start(&mut world, &certificates.flags("right-ca", None));
    world.hosts[0].wait_ready().unwrap();
}

/// Handshakes with a real etcd, both ways, with keys and files of each kind.
#[test]
fn the_certificates_that_go_takes_are_taken() {
    let mut world = World::without_config(1);
    let directory = world.lab.directory().join("tls");
    fs::create_dir(&directory).unwrap();
    let certificates = Certificates(&directory);
    let request = "openssl req -nodes -sha256 -days 2 -addext subjectAltName=IP:192.168.64.254";
    make(
        &directory,
        &format!(
            "# One file for all: authority, server and client.
             {request} -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-521 -subj /CN=one -keyout one.key -out one.pem
             # The same that is no authority.
             {request} -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -addext basicConstraints=critical,CA:FALSE \
               -subj /CN=leaf -keyout leaf.key -out leaf.pem
             # 1,024 bits throughout.
             openssl req -nodes -sha256 -days 2 -x509 -newkey rsa:1024 -subj /CN=short-ca -keyout short-ca.key -out short-ca.pem
             # A root and an intermediate authority, with words around them.
             openssl req -nodes -days 2 -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -subj /CN=root -keyout root.key -out root.pem
             openssl req -nodes -newkey rsa:3072 -subj /CN=middle -keyout middle.key -out csr
             echo basicConstraints=critical,CA:TRUE > ext
             openssl x509 -req -days 2 -in csr -CA root.pem -CAkey root.key -CAcreateserial -extfile ext -out middle.pem
             printf 'subjectAltName=IP:192.168.64.254\\n' > ext
             for name in short chain ed25519; do
               case $name in
                 short) key=rsa:1024 ca=short-ca;;
                 chain) key=rsa:2048 ca=middle;;
                 *) key=ed25519 ca=middle;;
               esac
               openssl req -nodes -newkey $key -subj /CN=$name -keyout $name.key -out csr
               openssl x509 -req -sha256 -days 2 -in csr -CA $ca.pem -CAkey $ca.key -CAcreateserial -extfile ext -text -out $name.pem
             done
             (echo '# our authorities'; openssl x509 -in one.pem; echo; openssl x509 -text -in root.pem) > bundle.pem
             cat middle.pem >> chain.pem
             cat middle.pem >> ed25519.pem
             # The older forms of keys: PKCS#1 and SEC1.
             openssl rsa -in chain.key -traditional -out old.key
             cp chain.pem old.pem
             openssl ec -in one.key -out sec1.key
             cp one.pem sec1.pem"
        ),
    );
    for (server, clients_of, authority, identities) in [
        ("one", "one", "one", &["one", "sec1"][..]),
        ("leaf", "one", "leaf", &["one"]),
        ("short", "short-ca", "short-ca", &["short"]),
        ("chain", "root", "bundle", &["chain", "ed25519", "old"]),
        ("ed25519", "root", "bundle", &["ed25519"]),
    ] {
        world.store.stop();
        world.store = certificates.server(&world, server, Some(clients_of));
        for identity in identities {
            start(&mut world, &certificates.flags(authority, Some(identity)));
            world.wait_log(0, CONNECTED);
        }
    }
}

/// One line for each failure: the endpoint, one cause, what to do.
#[test]
fn a_failure_to_connect_is_told_in_plain_words() {
    let mut world = World::without_config(1);
    let directory = world.lab.directory().join("tls");
    fs::create_dir(&directory).unwrap();
    let certificates = Certificates(&directory);
    certificates.make("right");
    let plain = world.store.endpoint().to_owned();
    let elsewhere = plain.replace("2379", "2380");
    fs::create_dir(world.lab.directory().join("tls-store")).unwrap();
    let (certificate, key) = (certificates.path("right-server.pem"), certificates.path("right-server.key"));
    let arguments = ["--cert-file", &certificate, "--key-file", &key];
    let tls_url = URL.replace("2379", "2381");
    let tls_directory = world.lab.directory().join("tls-store");
    let _tls = Store::start_with(&world.lab.underlay, &tls_url, &tls_directory, &arguments).unwrap();
    // Another server, which answers everything as HTTP/1 does.
    let web = world.lab.underlay.within(|| TcpListener::bind("192.168.64.254:8080")).unwrap().unwrap();
    std::thread::spawn(move || {
        for mut stream in web.incoming().flatten() {
            let _read = stream.read(&mut [0; 64]);
            let _written = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
        }
    });
    world.hosts[0].netns.ip("route add unreachable 203.0.113.1").unwrap();
    let authority = &certificates.flags("right-ca", None)[0];
    let https = plain.replace("http", "https");
    let http = tls_url.replace("https", "http");
    let refused = "connect: connection refused; check --etcd-endpoints, and that etcd runs there";
    for (endpoints, text) in [
        (elsewhere.clone(), format!("etcd at {elsewhere}: {refused}; trying again")),
        (format!("{elsewhere},{elsewhere}/x"), refused.to_owned()),
        (
            format!("{elsewhere},http://192.168.64.254:8080"),
            format!(
                "{elsewhere}: connection refused; http://192.168.64.254:8080: what answers there speaks HTTP/1, not gRPC \
                 (HTTP/1.1 400 Bad Request): another server, or a proxy; check --etcd-endpoints, and that etcd runs there"
            ),
        ),
        ("http://etcd..invalid:2379".to_owned(), "connect: etcd..invalid can't be resolved: ".to_owned()),
        (
            https,
            "connect: what answers there speaks in clear text, not TLS; write http:// in --etcd-endpoints".to_owned(),
        ),
        (http, "connect: what answers there speaks TLS, not clear text; write https:// in --etcd-endpoints".to_owned()),
        ("http://203.0.113.1:2379".to_owned(), "connect: no route to the host, or it is down; ".to_owned()),
    ] {
        let mut command = world.agent_on(0);
        command.arg(format!("--etcd-endpoints={endpoints}"));
        if endpoints.starts_with("https") {
            command.arg(authority);
        }
        world.hosts[0].agent = None;
        let log = world.lab.directory().join("agent.log");
        world.hosts[0].agent = Some(Process::start(&mut command, &log).unwrap());
        world.wait_log(0, &text);
        let log = world.hosts[0].agent.as_ref().unwrap().log();
        assert!(!log.contains("transport error") && !log.contains("tcp connect error"), "{log}");
    }
}
