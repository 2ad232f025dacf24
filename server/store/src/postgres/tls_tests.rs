//! TLS to a real PostgreSQL: what is encrypted, and who is not believed.

use std::path::PathBuf;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::rig::Cluster;
use super::tests::{boxed, options};
use super::*;
use crate::conformance::{self, Node, Pair};

/// An authority, and what it has signed for a host: certificate and key in PEM.
struct Signed {
    ca: String,
    certificate: String,
    key: String,
}

fn sign(host: &str) -> Signed {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let ca = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::from_params(&params, &key);
    let own = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec![host.to_owned()]).unwrap().signed_by(&own, &issuer).unwrap();
    Signed { ca, certificate: certificate.pem(), key: own.serialize_pem() }
}

#[test]
fn the_way_is_encrypted_and_others_are_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| -> PathBuf {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (signed, other) = (sign("127.0.0.1"), sign("127.0.0.1"));
    let (ca, strange) = (file("ca.pem", &signed.ca), file("strange.pem", &other.ca));
    let mut cluster = Cluster::start(&[]);
    let name = cluster.database().rsplit("dbname=").next().unwrap().to_owned();
    let port = cluster.listen((&signed.certificate, &signed.key));
    let url = |host: &str, mode: &str| format!("postgres://ringline@{host}:{port}/{name}{mode}");
    let open = |url: String, ca: Option<&PathBuf>| {
        let options = PostgresOptions { ca: ca.cloned(), timeout: Duration::from_secs(5), ..options(&url) };
        PostgresStore::open(options, 1)
    };
    let pair = Pair::new("ann", "bob");
    let plain =
        "SELECT bool_or(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'ringline'";
    let mut head = 0;
    for (mode, ca) in [("?sslmode=require", None), ("?sslmode=verify-full", Some(&ca)), ("", Some(&ca)), ("", None)] {
        let (handles, report) = open(url("127.0.0.1", mode), ca).unwrap_or_else(|error| panic!("{mode}: {error}"));
        assert!(!report.is_open);
        let mut node = Node::new(boxed(handles));
        if head == 0 {
            node.commit(&[pair.record()]);
        }
        node.commit(&(head + 1..=head + 50).map(|seq| pair.message(seq).into()).collect::<Vec<_>>());
        head += 50;
        conformance::check(&mut node, std::slice::from_ref(&pair), head);
        let all = plain.replace("bool_or(ssl)", "bool_and(ssl), bool_or(ssl)");
        let wanted = if mode.is_empty() && ca.is_none() { "f|f" } else { "t|t" };
        assert_eq!(cluster.sql(&name, &all), wanted, "{mode}");
        node.close();
        let since = Instant::now();
        while !cluster.sql(&name, plain).is_empty() {
            super::tests::wait(since, "the end of the sessions");
        }
    }
    let told = |url: String, ca| open(url, ca).err().expect("a refusal").to_string();
    for refused in
        [told(url("127.0.0.1", "?sslmode=verify-full"), Some(&strange)), told(url("127.0.0.1", ""), Some(&strange))]
    {
        assert!(refused.contains("invalid peer certificate"), "{refused}");
    }
    let named = told(url("localhost", ""), Some(&ca));
    assert!(named.contains("not valid for name") || named.contains("NotValidForName"), "{named}");
}

#[test]
fn a_server_without_tls_is_refused_when_it_is_asked_for() {
    let (signed, folder) = (sign("127.0.0.1"), tempfile::tempdir().unwrap());
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, &signed.ca).unwrap();
    let mut cluster = Cluster::start(&[]);
    let name = cluster.database().rsplit("dbname=").next().unwrap().to_owned();
    let port = cluster.listen((&signed.certificate, &signed.key));
    let url = format!("postgres://ringline@127.0.0.1:{port}/{name}?sslmode=require");
    cluster.forget_tls();
    for ca in [None, Some(ca)] {
        let refused = PostgresStore::open(PostgresOptions { ca, ..options(&url) }, 1).err().unwrap().to_string();
        assert!(refused.contains("does not support TLS"), "{refused}");
    }
}
