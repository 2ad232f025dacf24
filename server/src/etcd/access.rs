//! How the way to etcd is hidden, and who this node says to be there. Read at the start by the main thread, used on the side thread.
//!
//! - TLS 1.3 alone, as between nodes: etcd has to show a certificate that `etcd.ca` has signed for the host that was dialled,
//!   and is shown that of `etcd.cert`, if there is one (`--client-cert-auth`). Loaded once.
//! - A user has a password in a file, which is read anew whenever etcd is to give a token for it: it may be changed while
//!   nodes run. Neither is ever logged.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::peers::secure;

/// The longest password.
const PASSWORD_BYTES_MAX: usize = 1_024;

/// What is believed of etcd, and shown to it.
#[derive(Clone)]
pub struct Tls(Arc<ClientConfig>);

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

impl Tls {
    /// Reads `etcd.ca`, and `etcd.cert` and `etcd.key` if they are not empty. Errors: one line that names key and file.
    pub fn load(ca: &str, (cert, key): (&str, &str)) -> Result<Self, String> {
        let told = |error: secure::SecureError| error.to_string();
        let roots = secure::roots("etcd.ca", Path::new(ca)).map_err(told)?;
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_protocol_versions(&[&rustls::version::TLS13]).map_err(|error| error.to_string())?;
        let builder = builder.with_root_certificates(roots);
        if cert.is_empty() {
            return Ok(Self(Arc::new(builder.with_no_client_auth())));
        }
        let chain = secure::certificates("etcd.cert", Path::new(cert)).map_err(told)?;
        let key = secure::private_key("etcd.key", Path::new(key)).map_err(told)?;
        let config = builder.with_client_auth_cert(chain, key);
        Ok(Self(Arc::new(config.map_err(|error| format!("etcd.cert and etcd.key: {error}"))?)))
    }

    /// Errors: no certificate, or none for `host`, or etcd does not like this node's.
    pub(super) async fn connect(&self, host: &str, stream: TcpStream) -> Result<TlsStream<TcpStream>, String> {
        let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
        TlsConnector::from(Arc::clone(&self.0)).connect(name, stream).await.map_err(|error| format!("TLS: {error}"))
    }
}

/// A user of etcd.
#[derive(Clone, Debug)]
pub struct Login {
    pub user: String,
    /// Its first line is the password.
    pub password_file: PathBuf,
}

impl Login {
    /// Errors: one line that names the file.
    pub(super) fn password(&self) -> Result<String, String> {
        let told = |why: &dyn fmt::Display| format!("etcd.password_file {}: {why}", self.password_file.display());
        let text = std::fs::read_to_string(&self.password_file).map_err(|error| told(&error))?;
        let password = text.lines().next().unwrap_or_default();
        match password.len() {
            0 => Err(told(&"its first line is empty")),
            1..=PASSWORD_BYTES_MAX => Ok(password.to_owned()),
            _ => Err(told(&"its first line is too long")),
        }
    }
}

/// What is needed beside an address.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// `None`: only endpoints without TLS can be reached.
    pub tls: Option<Tls>,
    /// `None`: nobody in particular.
    pub login: Option<Login>,
}

/// Whether a host is this machine: what is sent there can't be read on the way.
pub(super) fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_the_first_line_of_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let login = Login { user: "ringline".into(), password_file: folder.path().join("password") };
        let told = login.password().unwrap_err();
        assert!(told.starts_with("etcd.password_file /") && told.contains("password: "), "{told}");
        let with = |text: &str| {
            std::fs::write(&login.password_file, text).unwrap();
            login.password()
        };
        assert_eq!(with("s3cret word \nrest"), Ok("s3cret word ".to_owned()));
        assert!(with("\n").unwrap_err().contains("empty"));
        let told = with(&"x".repeat(PASSWORD_BYTES_MAX + 1)).unwrap_err();
        assert!(told.contains("too long") && !told.contains("xxx"), "{told}");
    }

    #[test]
    fn files_that_are_no_identity_are_named_by_key() {
        let folder = tempfile::tempdir().unwrap();
        let certs = folder.path().join("certs");
        crate::certs::make(&certs, &["a".to_owned(), "b".to_owned()], (30, true)).unwrap();
        let file = |name: &str| certs.join(name).display().to_string();
        let load = |ca: &str, cert: &str, key: &str| {
            let name = |name: &str| if name.is_empty() { String::new() } else { file(name) };
            Tls::load(&name(ca), (&name(cert), &name(key))).map(|_| ())
        };
        assert_eq!(load("ca.pem", "", ""), Ok(()));
        assert_eq!(load("ca.pem", "a.pem", "a.key"), Ok(()));
        let told = |ca, cert, key| load(ca, cert, key).unwrap_err();
        assert!(told("none.pem", "", "").starts_with("etcd.ca: "));
        assert!(told("a.key", "", "").starts_with("etcd.ca: "));
        assert!(told("ca.pem", "a.key", "a.key").starts_with("etcd.cert: "));
        assert!(told("ca.pem", "a.pem", "a.pem").starts_with("etcd.key: "));
        assert!(told("ca.pem", "a.pem", "b.key").starts_with("etcd.cert and etcd.key: "));
        let hosts = ["localhost", "127.0.0.1", "::1", "10.0.0.1", "etcd.example"].map(is_loopback);
        assert_eq!(hosts, [true, true, true, false, false]);
    }
}
