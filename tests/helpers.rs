//! Connections that conntrack's helpers read (FTP, TFTP, SIP): what they announce is let in because of that, and for no other
//! reason.

use std::{
    io::{BufRead, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd as _,
    thread,
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use xtask::lab::Pod;

use crate::{
    overlays::Overlay,
    services::SERVICE,
    sockets::{connection, listener_in, set_prompt, socket_in, within},
    world::{SOON, World},
};

const FTP: u16 = 21;
const TFTP: u16 = 69;
const SIP: u16 = 5060;
/// Of each kind.
const TRANSFERS: u16 = 50;

/// A firewall that lets nothing new in but what asks for a transfer.
const RULES: &str = r#"table ip helpers {
    ct helper ftp { type "ftp" protocol tcp; }
    ct helper tftp { type "tftp" protocol udp; }
    ct helper sip { type "sip" protocol udp; }
    chain assign {
        type filter hook prerouting priority -150;
        tcp dport 21 ct helper set "ftp"
        udp dport 69 ct helper set "tftp"
        udp dport 5060 ct helper set "sip"
    }
    chain only {
        type filter hook forward priority 10; policy drop;
        ct state established,related accept
        ct state new tcp dport 21 accept
        ct state new udp dport { 69, 5060 } accept
    }
}
"#;

/// Has pods of two hosts transfer among such firewalls.
fn assert_transfers(overlay: Overlay) {
    let world = overlay.world();
    for host in &world.hosts {
        host.netns.feed("nft -f -", RULES).unwrap();
    }
    let [client, server] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    let blocked = within(&client.netns, || {
        TcpStream::connect_timeout(&(server.address, 2000).into(), Duration::from_millis(200))
    });
    assert!(blocked.is_err(), "what nobody announced is let in");
    ftp(client, server, server.address);
    ftp_by_service(&world);
    tftp(client, server);
    sip(client, server);
}

/// The service's address leads to the server, whose answers name the server's own: the helper translates these.
fn ftp_by_service(world: &World) {
    let [client, server] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    let text = format!(
        "table ip address {{ chain pre {{ type nat hook prerouting priority dstnat; ip daddr {} tcp dport {FTP} dnat to {}; }}\n}}\n",
        SERVICE.ip(),
        server.address
    );
    world.hosts[0].netns.feed("nft -f -", &text).unwrap();
    ftp(client, server, *SERVICE.ip());
}

/// RFC 959: `h1,h2,h3,h4,p1,p2`.
fn host_port(address: SocketAddrV4) -> String {
    let ([a, b, c, d], [high, low]) = (address.ip().octets(), address.port().to_be_bytes());
    format!("{a},{b},{c},{d},{high},{low}")
}

fn parse_host_port(text: &str) -> SocketAddrV4 {
    let numbers: Vec<u8> = text.split(',').map(|number| number.trim().parse().unwrap()).collect();
    let [a, b, c, d, high, low] = numbers[..] else { panic!("{text:?} is no address") };
    SocketAddrV4::new(Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([high, low]))
}

fn line_of(reader: &mut impl BufRead) -> String {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

/// By one connection, transfers of both kinds, each of its own number.
fn ftp(client: &Pod, server: &Pod, asked: Ipv4Addr) {
    let listener = listener_in(&server.netns, server.address, FTP);
    let (control, served) = connection(&client.netns, SocketAddrV4::new(asked, FTP), &listener);
    thread::scope(|scope| {
        let (address, netns) = (server.address, &server.netns);
        scope.spawn(move || within(netns, || serve_ftp(&served, address)));
        within(&client.netns, || ask_ftp(&control, client.address, asked));
    });
}

/// `PORT` and `PASV`, and a number for each.
fn serve_ftp(control: &TcpStream, address: Ipv4Addr) {
    let mut lines = BufReader::new(control);
    // The helper reads from the second line of each direction on.
    reply(control, "220 ready");
    assert_eq!(line_of(&mut lines), "USER anonymous");
    reply(control, "230 logged in");
    for number in 0..2 * TRANSFERS {
        let command = line_of(&mut lines);
        let mut data = match command.strip_prefix("PORT ") {
            Some(to) => {
                reply(control, "200 PORT command successful");
                TcpStream::connect_timeout(&parse_host_port(to).into(), SOON).unwrap()
            }
            None => {
                assert_eq!(command, "PASV");
                let listener = TcpListener::bind((address, 0)).unwrap();
                let port = listener.local_addr().unwrap().port();
                let named = host_port(SocketAddrV4::new(address, port));
                reply(control, &format!("227 Entering Passive Mode ({named})."));
                accept(&listener)
            }
        };
        data.write_all(&number.to_be_bytes()).unwrap();
    }
}

fn ask_ftp(control: &TcpStream, address: Ipv4Addr, asked: Ipv4Addr) {
    let mut lines = BufReader::new(control);
    assert_eq!(line_of(&mut lines), "220 ready");
    reply(control, "USER anonymous");
    assert_eq!(line_of(&mut lines), "230 logged in");
    for number in 0..2 * TRANSFERS {
        let mut data = if number % 2 == 0 {
            let listener = TcpListener::bind((address, 0)).unwrap();
            let port = listener.local_addr().unwrap().port();
            reply(control, &format!("PORT {}", host_port(SocketAddrV4::new(address, port))));
            assert!(line_of(&mut lines).starts_with("200 "));
            accept(&listener)
        } else {
            reply(control, "PASV");
            let answer = line_of(&mut lines);
            let named = answer.split(['(', ')']).nth(1).unwrap_or_else(|| panic!("{answer:?}"));
            let named = parse_host_port(named);
            assert_eq!(*named.ip(), asked, "transfer {number}: as whom it was asked");
            TcpStream::connect_timeout(&named.into(), SOON).unwrap_or_else(|error| panic!("transfer {number}: {error}"))
        };
        data.set_read_timeout(Some(SOON)).unwrap();
        let mut got = [0; 2];
        data.read_exact(&mut got).unwrap();
        assert_eq!(u16::from_be_bytes(got), number);
    }
}

fn reply(mut control: &TcpStream, line: &str) {
    control.write_all(format!("{line}\r\n").as_bytes()).unwrap();
}

/// The next connection, with a limit.
fn accept(listener: &TcpListener) -> TcpStream {
    let limit = PollTimeout::try_from(SOON).unwrap();
    let ready = poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], limit).unwrap();
    assert_eq!(ready, 1, "no data connection came");
    let (stream, _) = listener.accept().unwrap();
    set_prompt(&stream);
    stream
}

fn udp(pod: &Pod, port: u16) -> UdpSocket {
    let socket = socket_in(&pod.netns, SocketAddrV4::new(pod.address, port));
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket
}

/// RFC 1350: each request is answered from another port. All from one port, so that they are one flow.
fn tftp(client: &Pod, server: &Pod) {
    const READ_REQUEST: &[u8] = b"\0\x01file\0octet\0";
    let (asking, asked) = (udp(client, 0), udp(server, TFTP));
    for number in 0..2 * TRANSFERS {
        asking.send_to(READ_REQUEST, (server.address, TFTP)).unwrap();
        let mut request = [0; 64];
        let (len, from) = asked.recv_from(&mut request).unwrap();
        assert_eq!(&request[..len], READ_REQUEST);
        let [high, low] = number.to_be_bytes();
        let answering = udp(server, 0);
        answering.send_to(&[0, 3, 0, 1, high, low], from).unwrap();
        let mut data = [0; 64];
        let (len, from) = asking.recv_from(&mut data).unwrap_or_else(|error| panic!("transfer {number}: {error}"));
        assert_eq!((&data[..len], from.port()), (&[0, 3, 0, 1, high, low][..], answering.local_addr().unwrap().port()));
    }
}

/// RFC 3261 and 8866: each call names a port for what is to be heard, which the called sends to.
fn sip(client: &Pod, server: &Pod) {
    let (calling, called) = (udp(client, SIP), udp(server, SIP));
    let [one, two] = [client.address, server.address];
    for number in 0..2 * TRANSFERS {
        // Even, as RTP has it.
        let port = 20_000 + 2 * number;
        let heard = udp(client, port);
        let session = format!(
            "v=0\r\no=- {number} 1 IN IP4 {one}\r\ns=-\r\nc=IN IP4 {one}\r\nt=0 0\r\nm=audio {port} RTP/AVP 0\r\n"
        );
        let invite = format!(
            "INVITE sip:b@{two} SIP/2.0\r\nVia: SIP/2.0/UDP {one}:{SIP};branch=z9hG4bK{number}\r\nMax-Forwards: 70\r\n\
             From: <sip:a@{one}>;tag={number}\r\nTo: <sip:b@{two}>\r\nCall-ID: {number}@{one}\r\nCSeq: {number} INVITE\r\n\
             Contact: <sip:a@{one}:{SIP}>\r\nContent-Type: application/sdp\r\nContent-Length: {}\r\n\r\n{session}",
            session.len()
        );
        calling.send_to(invite.as_bytes(), (two, SIP)).unwrap();
        let mut request = [0; 1500];
        let (len, _) = called.recv_from(&mut request).unwrap();
        assert_eq!(&request[..len], invite.as_bytes());
        let speaking = udp(server, 0);
        speaking.send_to(&number.to_be_bytes(), (one, port)).unwrap();
        let mut got = [0; 2];
        heard.recv(&mut got).unwrap_or_else(|error| panic!("call {number}: {error}"));
        assert_eq!(u16::from_be_bytes(got), number);
    }
}

#[test]
fn transfers_that_helpers_announce_are_let_in_by_the_kernels_device() {
    assert_transfers(Overlay::Kernel);
}

#[test]
fn transfers_that_helpers_announce_are_let_in_through_the_stack() {
    assert_transfers(Overlay::Slow);
}

#[test]
fn transfers_that_helpers_announce_are_let_in() {
    assert_transfers(Overlay::Fast);
}
