//! Who is not let in at the peer port: each is refused, counted by its reason, and harms nobody.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use ringline_cluster::link::frame::{BATCH_BYTES_MAX, Frame};
use ringline_cluster::link::hello::{Hello, Incarnation};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};

use super::rig::{Cluster, Kind};
use super::{A, B};
use crate::certs;
use crate::peers::conn::GREETING_MS;
use crate::peers::refused::Reason;

/// Believes everybody: a stranger does.
#[derive(Debug)]
struct Gullible(Arc<CryptoProvider>);

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A TLS client with these files (`None`: no certificate) that says `bytes` and reads until it is closed.
fn stranger(address: std::net::SocketAddr, files: Option<(std::path::PathBuf, &str)>, bytes: Vec<u8>) {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible(provider)));
    let config = match files {
        None => builder.with_no_client_auth(),
        Some((folder, node)) => {
            let chain = CertificateDer::pem_file_iter(folder.join(format!("{node}.pem"))).unwrap();
            let key = PrivateKeyDer::from_pem_file(folder.join(format!("{node}.key"))).unwrap();
            builder.with_client_auth_cert(chain.map(Result::unwrap).collect(), key).unwrap()
        }
    };
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let tls = ClientConnection::new(Arc::new(config), ServerName::try_from("a").unwrap()).unwrap();
    let mut stream = StreamOwned::new(tls, socket);
    // Refused at any point of it.
    let _ = stream.write_all(&bytes).and_then(|()| stream.flush());
    let _ = stream.read_to_end(&mut Vec::new());
}

fn plain(address: std::net::SocketAddr, bytes: Vec<u8>) {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let _ = socket.write_all(&bytes);
    let _ = socket.read_to_end(&mut Vec::new());
}

fn hello(node: &str) -> Hello {
    let (cluster, node) = ("test".to_owned(), node.to_owned());
    Hello { cluster, node, incarnation: Incarnation(77), list: 0, protocol: (1, 1), cores: 1, core: 0, knows: None }
}

fn said(frames: &[Frame]) -> Vec<u8> {
    let mut bytes = Vec::new();
    frames.iter().for_each(|frame| frame.encode(&mut bytes));
    bytes
}

fn count(cluster: &Cluster, reason: Reason) -> u64 {
    cluster.snapshot(A, 0).counters.refused[reason as usize]
}

/// Runs a stranger beside the cluster until it was refused for this reason, and looks whether nothing else was hurt.
fn refused(cluster: &mut Cluster, reason: Reason, act: impl FnOnce() + Send + 'static) {
    let before = cluster.snapshot(A, 0).counters.refused;
    let thread = std::thread::spawn(act);
    cluster.until(reason.name(), |cluster| count(cluster, reason) > before[reason as usize]);
    cluster.until("the stranger is closed", |_| thread.is_finished());
    thread.join().unwrap();
    let mut expected = before;
    expected[reason as usize] += 1;
    assert_eq!(cluster.snapshot(A, 0).counters.refused, expected, "only {}", reason.name());
    assert!(cluster.is_up((A, 0), B) && cluster.is_up((B, 0), A));
}

#[test]
fn strangers_are_refused_and_counted_by_their_reason() {
    for kind in [Kind::Epoll, Kind::Ring] {
        let mut cluster = Cluster::new(kind, &[("a", 1), ("b", 1)]);
        cluster.until("all are up", Cluster::all_up);
        let (folder, at) = (cluster.folder().to_owned(), cluster.address(A));
        let elsewhere = tempfile::tempdir().unwrap();
        let other = elsewhere.path().to_owned();
        certs::make(&other, &["b".to_owned()], (1, true)).unwrap();
        certs::make(&folder, &["d".to_owned()], (1, false)).unwrap();
        let own = |node: &'static str| Some((folder.clone(), node));

        refused(&mut cluster, Reason::NotTls, move || plain(at, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec()));
        refused(&mut cluster, Reason::NotTls, move || plain(at, said(&[Frame::Hello(hello("b"))])));
        refused(&mut cluster, Reason::NoCertificate, move || stranger(at, None, said(&[Frame::Hello(hello("b"))])));
        refused(&mut cluster, Reason::WrongCa, move || stranger(at, Some((other, "b")), Vec::new()));
        let cases = [
            (Reason::OtherCluster, "b", Frame::Hello(Hello { cluster: "prod".into(), ..hello("b") })),
            (Reason::OtherList, "b", Frame::Hello(Hello { list: 1, ..hello("b") })),
            (Reason::OtherName, "b", Frame::Hello(hello("c"))),
            (Reason::OtherName, "d", Frame::Hello(hello("b"))),
            (Reason::OwnName, "a", Frame::Hello(hello("a"))),
            (Reason::UnknownNode, "d", Frame::Hello(hello("d"))),
            (Reason::Protocol, "b", Frame::Hello(Hello { protocol: (9, 9), ..hello("b") })),
            (Reason::OldIncarnation, "b", Frame::Hello(Hello { incarnation: Incarnation(0), ..hello("b") })),
            (Reason::Core, "b", Frame::Hello(Hello { core: 1, ..hello("b") })),
            (Reason::Garbage, "b", Frame::Beat { clients: 1 }),
        ];
        for (reason, node, frame) in cases {
            // 0 is no incarnation, so that hello can't even be read.
            let reason = if reason == Reason::OldIncarnation { Reason::Garbage } else { reason };
            let files = own(node);
            refused(&mut cluster, reason, move || stranger(at, files, said(&[frame])));
        }
        let files = own("b");
        let huge = [0xff, 0xff, 0xff, 0x7f, 1, 0, 0, 0].to_vec();
        refused(&mut cluster, Reason::Huge, move || stranger(at, files, huge));
    }
}

#[test]
fn who_says_nothing_is_closed_in_time_and_too_many_are_not_waited_for() {
    let mut cluster = Cluster::new(Kind::Epoll, &[("a", 1), ("b", 1)]);
    cluster.until("all are up", Cluster::all_up);
    let at = cluster.address(A);
    let silent: Vec<_> = (0..70).map(|_| TcpStream::connect(at).unwrap()).collect();
    cluster.until("some were not even read", |cluster| count(cluster, Reason::TooMany) >= 6);
    // In steps below the silence that would end the link itself.
    for _ in 0..3 {
        cluster.advance_clock(GREETING_MS / 2);
        cluster.run_for(Duration::from_millis(50));
    }
    cluster.until("the others were closed", |cluster| count(cluster, Reason::Late) == 64);
    assert_eq!(count(&cluster, Reason::TooMany), 6);
    assert!(cluster.is_up((A, 0), B));
    drop(silent);
    cluster.run_for(Duration::from_millis(50));
    assert!(cluster.is_up((B, 0), A));
}

#[test]
fn a_node_with_a_defect_ends_its_connection_and_not_its_peer() {
    let mut cluster = Cluster::stopped(Kind::Epoll, &[("a", 1), ("b", 1)]);
    cluster.start(A);
    cluster.run_for(Duration::from_millis(50));
    let (folder, at) = (cluster.folder().to_owned(), cluster.address(A));
    let batch = |number| Frame::Batch { number, bytes: bytes::Bytes::from_static(b"\xff\xff\xff\xffrubbish") };
    let cases = [
        (Reason::Garbage, said(&[Frame::Hello(hello("b")), batch(1)])),
        (Reason::Violation, said(&[Frame::Hello(hello("b")), batch(9)])),
        (Reason::Violation, said(&[Frame::Hello(hello("b")), Frame::Hello(hello("b"))])),
        (Reason::Violation, said(&[Frame::Hello(hello("b")), Frame::Taken { number: 5, window_end: 0 }])),
        (
            Reason::Huge,
            [said(&[Frame::Hello(hello("b"))]), (BATCH_BYTES_MAX as u32 * 2).to_le_bytes().to_vec(), vec![2; 4]]
                .concat(),
        ),
    ];
    for (reason, bytes) in cases {
        let before = count(&cluster, reason);
        let folder = folder.clone();
        let bye = matches!(reason, Reason::Garbage);
        let bytes = if bye { [bytes, said(&[Frame::Bye])].concat() } else { bytes };
        let thread = std::thread::spawn(move || stranger(at, Some((folder, "b")), bytes));
        cluster.until(reason.name(), |cluster| count(cluster, reason) > before);
        cluster.until("the stranger is closed", |_| thread.is_finished());
        thread.join().unwrap();
    }
    // The real one, whose incarnation is lower than what the impostor with its certificate has claimed, is refused by name.
    cluster.start(B);
    cluster.until("b is refused", |cluster| count(cluster, Reason::OldIncarnation) > 0);
}
