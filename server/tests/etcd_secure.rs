//! The way to a real etcd that is hidden, and one that asks who is there: certificates of both sides, users, tokens that end.

mod common;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::etcd::Etcd;
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use ringline::etcd::access::{Access, Login, Tls};
use ringline::etcd::drains::Drains;
use ringline::etcd::entry::Entry;
use ringline::etcd::gateway::EtcdError;
use ringline::etcd::lease::LeaseClock;
use ringline::etcd::{Directory, EtcdOptions, Keeper, watch};
use ringline_cluster::link::hello::Incarnation;
use ringline_cluster::membership::{Member, Standing};
use ringline_cluster::placement::NodeIndex;
use ringline_cluster::reconcile::Start;
use ringline_core::config::Lease;
use tokio::sync::{Notify, watch as changing};

const PASSWORD: &str = "correct horse";

fn options(endpoint: &str, access: Access) -> EtcdOptions {
    // Longer than one needs: a password is checked slowly on purpose, and the machine may be busy.
    let timeout = Duration::from_secs(20);
    EtcdOptions { endpoints: vec![endpoint.parse().unwrap()], prefix: "/test".into(), timeout, access }
}

fn entry() -> Entry {
    let member = Member {
        incarnation: Incarnation(1),
        peer_address: SocketAddr::from(([127, 0, 0, 1], 9_800)),
        client_address: "127.0.0.1:9700".into(),
        weight: 1,
        client_weight: 1,
        connections: 0,
        standing: Standing::Up,
    };
    Entry { member, start: Start(1), number: NodeIndex(0), owned: Some(0) }
}

fn clock() -> LeaseClock {
    LeaseClock::new(Instant::now(), Lease::new(0))
}

/// An authority, and what it has signed for etcd and for a node.
struct Certificates {
    folder: PathBuf,
}

impl Certificates {
    fn make(folder: &Path) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        let write = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        write("ca.pem", params.self_signed(&key).unwrap().pem());
        let issuer = Issuer::from_params(&params, &key);
        for (name, host) in [("etcd", "127.0.0.1"), ("node", "a"), ("named", "a")] {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
            if name == "node" {
                params.distinguished_name = DistinguishedName::new();
            }
            // The gateway of etcd shows the server's certificate to the server itself.
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            write(&format!("{name}.pem"), params.signed_by(&key, &issuer).unwrap().pem());
            write(&format!("{name}.key"), key.serialize_pem());
        }
        Self { folder: folder.to_owned() }
    }

    fn file(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn etcd(&self) -> Etcd {
        Etcd::start_secure(&[
            "--client-cert-auth",
            "--trusted-ca-file",
            &self.file("ca.pem"),
            "--cert-file",
            &self.file("etcd.pem"),
            "--key-file",
            &self.file("etcd.key"),
        ])
    }

    /// Of a node, with a certificate that has no common name.
    fn tls(&self) -> Tls {
        self.tls_of("node")
    }

    fn tls_of(&self, name: &str) -> Tls {
        let file = |ending: &str| self.file(&format!("{name}.{ending}"));
        Tls::load(&self.file("ca.pem"), (&file("pem"), &file("key"))).unwrap()
    }
}

/// Registers, is seen, is marked, and hears the bell: all that is ever asked of etcd.
async fn serves(options: &EtcdOptions) {
    let bell = Arc::new(Notify::new());
    let ringing = tokio::spawn(watch::ring(options.clone(), bell.clone()));
    let clock = clock();
    let registering = Keeper::register(options, "a", entry(), clock.clone());
    let keeper = tokio::time::timeout(PATIENCE, registering).await.expect("it registers").unwrap();
    let (sender, receiver) = changing::channel(entry());
    let keeping = tokio::spawn(keeper.keep(receiver));
    let (mut directory, mut drains) = (Directory::new(options), Drains::new(options));
    assert!(directory.list().await.unwrap().may_live("a", Start(1)));
    while tokio::time::timeout(Duration::from_secs(2), bell.notified()).await.is_ok() {}
    drains.mark("a").await.unwrap();
    tokio::time::timeout(PATIENCE, bell.notified()).await.expect("the bell rings");
    assert!(directory.list().await.unwrap().drained.contains("a"));
    assert!(drains.unmark("a").await.unwrap());
    drop(sender);
    assert_eq!(keeping.await.unwrap(), Ok(()));
    assert!(directory.list().await.unwrap().entries.is_empty());
    ringing.abort();
}

async fn refused(options: &EtcdOptions) -> EtcdError {
    Directory::new(options).list().await.unwrap_err()
}

#[tokio::test]
async fn both_sides_show_a_certificate_or_nothing_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let certificates = Certificates::make(&folder.path().join("ours"));
    let etcd = certificates.etcd();
    let secure = etcd.secure_endpoint();
    let with = |tls: Option<Tls>| options(&secure, Access { tls, login: None });
    serves(&with(Some(certificates.tls()))).await;
    let unreachable = |error: EtcdError| match error {
        EtcdError::Unreachable { why, .. } => why,
        other => panic!("{other}"),
    };
    let nobody = Tls::load(&certificates.file("ca.pem"), ("", "")).unwrap();
    let told = unreachable(refused(&with(Some(nobody))).await);
    assert!(!told.is_empty(), "etcd asks for a certificate");
    let strangers = Certificates::make(&folder.path().join("theirs"));
    let told = unreachable(refused(&with(Some(strangers.tls()))).await);
    assert!(told.contains("TLS") && told.contains("certificate"), "who signed etcd's is not believed: {told}");
    let told = unreachable(refused(&with(None)).await);
    assert!(told.contains("etcd.ca"), "{told}");
    let elsewhere = secure.replace("127.0.0.1", "localhost");
    let told = unreachable(refused(&options(&elsewhere, with(Some(certificates.tls())).access)).await);
    assert!(told.contains("TLS"), "its certificate is for another name: {told}");
    let plain = secure.replace("https", "http");
    unreachable(refused(&options(&plain, Access::default())).await);
}

/// Users of an etcd: root, ringline who may what the cluster needs, and reader who may nothing.
fn add_users(etcd: &Etcd) {
    let prefix = r#""key":"L3Rlc3Qv","range_end":"L3Rlc3Qw""#;
    for (path, json) in [
        ("user/add", format!(r#"{{"name":"root","password":"{PASSWORD}"}}"#)),
        ("role/add", r#"{"name":"root"}"#.to_owned()),
        ("user/grant", r#"{"user":"root","role":"root"}"#.to_owned()),
        ("role/add", r#"{"name":"ringline"}"#.to_owned()),
        ("role/grant", format!(r#"{{"name":"ringline","perm":{{"permType":"READWRITE",{prefix}}}}}"#)),
        ("user/add", format!(r#"{{"name":"ringline","password":"{PASSWORD}"}}"#)),
        ("user/grant", r#"{"user":"ringline","role":"ringline"}"#.to_owned()),
        ("user/add", format!(r#"{{"name":"reader","password":"{PASSWORD}"}}"#)),
        ("auth/enable", "{}".to_owned()),
    ] {
        let path = if path == "auth/enable" { "/v3/auth/enable".to_owned() } else { format!("/v3/auth/{path}") };
        let answer = etcd.ask(&path, &json).unwrap();
        assert!(answer.contains("200 OK"), "{path}: {answer}");
    }
}

#[tokio::test]
async fn a_user_is_logged_in_and_logged_in_again_when_its_token_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let certificates = Certificates::make(&folder.path().join("ours"));
    let mut etcd = certificates.etcd();
    let password_file = folder.path().join("password");
    std::fs::write(&password_file, format!("{PASSWORD}\n")).unwrap();
    let login = |user: &str| Some(Login { user: user.to_owned(), password_file: password_file.clone() });
    let with =
        |user: &str| options(&etcd.secure_endpoint(), Access { tls: Some(certificates.tls()), login: login(user) });
    let (ours, reader, stranger) = (with("ringline"), with("reader"), with("nobody"));
    let anonymous = EtcdOptions { access: Access::default(), ..options(&etcd.endpoint(), Access::default()) };
    let early = EtcdOptions { access: Access { tls: None, login: login("ringline") }, ..anonymous.clone() };
    // Where nobody has to log in, nobody does; and one that began so logs in when users are made.
    let mut began_early = Directory::new(&early);
    began_early.list().await.unwrap();
    add_users(&etcd);
    began_early.list().await.unwrap();
    serves(&ours).await;
    let named = Access { tls: Some(certificates.tls_of("named")), login: login("ringline") };
    let named = options(&etcd.secure_endpoint(), named);
    let message = |error: EtcdError| match error {
        EtcdError::Refused { message, .. } => message,
        other => panic!("{other}"),
    };
    assert!(message(refused(&anonymous).await).contains("user name is empty"));
    // Its gateway does so where a client could be taken for the user in its certificate.
    assert!(message(refused(&named).await).contains("CommonName"));
    assert!(message(refused(&reader).await).contains("permission denied"));
    assert!(message(refused(&stranger).await).contains("authentication failed"));

    // Tokens are forgotten by a server that ends; a lease is renewed and the bell rings all the same.
    let clock = clock();
    let keeper = Keeper::register(&ours, "a", entry(), clock.clone()).await.unwrap();
    let (sender, receiver) = changing::channel(entry());
    let keeping = tokio::spawn(keeper.keep(receiver));
    let bell = Arc::new(Notify::new());
    let ringing = tokio::spawn(watch::ring(ours.clone(), bell.clone()));
    let mut directory = Directory::new(&ours);
    assert!(directory.list().await.unwrap().may_live("a", Start(1)));
    etcd.stop();
    etcd.begin();
    assert!(directory.list().await.unwrap().may_live("a", Start(1)));
    sender.send_modify(|entry| entry.member.connections = 7);
    let deadline = Instant::now() + PATIENCE;
    while directory.list().await.unwrap().entries["a"].member.connections != 7 {
        assert!(Instant::now() < deadline && !keeping.is_finished(), "it is written with another token");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    while tokio::time::timeout(Duration::from_secs(4), bell.notified()).await.is_ok() {}
    Drains::new(&ours).mark("b").await.unwrap();
    tokio::time::timeout(PATIENCE, bell.notified()).await.expect("the bell rings");
    ringing.abort();
    drop(sender);
    assert_eq!(keeping.await.unwrap(), Ok(()));

    // A password is looked at when it is needed.
    std::fs::write(&password_file, "another\n").unwrap();
    assert!(message(refused(&ours).await).contains("authentication failed"));
    std::fs::remove_file(&password_file).unwrap();
    assert!(matches!(refused(&ours).await, EtcdError::Password(why) if why.contains("etcd.password_file")));
}
