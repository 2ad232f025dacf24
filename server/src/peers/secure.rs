//! Certificates of nodes: which are believed, and who is named in one. Loaded once at the start, shared by all cores.
//!
//! TLS 1.3 only, both sides show a certificate that the cluster's own CA has signed, and no session is resumed: every
//! connection proves itself anew. A node's name is a DNS name in its certificate (subject alternative name); whoever
//! dials demands the name it dials, and whoever is called reads the name and compares it with the hello.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

/// Why the files make no identity. Each is one line that names the file.
#[derive(Debug, thiserror::Error)]
pub enum SecureError {
    #[error("{key}: cannot read {path}: {error}", path = path.display())]
    Unreadable { key: &'static str, path: PathBuf, error: io::Error },
    #[error("{key}: {path} holds no {what} in PEM", path = path.display())]
    NotPem { key: &'static str, path: PathBuf, what: &'static str },
    #[error("{key}: {path}: {error}", path = path.display())]
    BadCa { key: &'static str, path: PathBuf, error: rustls::Error },
    #[error("cluster.cert: {path} is a certificate for {found}, this node is {node:?}", path = path.display())]
    OtherName { path: PathBuf, node: String, found: String },
    #[error("cluster.cert and cluster.key: {0}")]
    Pair(rustls::Error),
    #[error("cluster.ca: {0}")]
    Verifier(String),
}

/// What one process shows and believes.
#[derive(Clone, Debug)]
pub struct Identity {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Identity {
    /// Reads the PEM files of the CA, of this node's certificate and of its key.
    ///
    /// Errors: [`SecureError`], also when the certificate is not for `node`.
    pub fn load((ca, cert, key): (&Path, &Path, &Path), node: &str) -> Result<Self, SecureError> {
        let roots = roots("cluster.ca", ca)?;
        let chain = certificates("cluster.cert", cert)?;
        let names = chain.first().map(names_in).unwrap_or_default();
        if !names.iter().any(|name| name == node) {
            let found = if names.is_empty() { "nobody".to_owned() } else { names.join(", ") };
            return Err(SecureError::OtherName { path: cert.to_owned(), node: node.to_owned(), found });
        }
        Self::build(roots, chain, private_key("cluster.key", key)?)
    }

    fn build(
        roots: RootCertStore,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, SecureError> {
        let provider: Arc<CryptoProvider> = Arc::new(ring::default_provider());
        let versions = &[&rustls::version::TLS13];
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots.clone()), provider.clone())
            .build()
            .map_err(|error| SecureError::Verifier(error.to_string()))?;
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .map_err(SecureError::Pair)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(SecureError::Pair)?;
        client.resumption = rustls::client::Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(SecureError::Pair)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(SecureError::Pair)?;
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }

    /// The side that dials `node`. Errors: the name is no DNS name.
    pub fn dial(&self, node: &str) -> Result<rustls::Connection, rustls::Error> {
        let bad = |_| rustls::Error::General("the node's name is no DNS name".to_owned());
        let name = ServerName::try_from(node.to_owned()).map_err(bad)?;
        ClientConnection::new(self.client.clone(), name).map(rustls::Connection::Client)
    }

    /// The side that is called.
    pub fn accept(&self) -> Result<rustls::Connection, rustls::Error> {
        ServerConnection::new(self.server.clone()).map(rustls::Connection::Server)
    }
}

/// The DNS names in a certificate; none when it can't be read.
pub fn names_in(certificate: &CertificateDer<'_>) -> Vec<String> {
    let read = webpki::EndEntityCert::try_from(certificate);
    read.map(|read| read.valid_dns_names().map(str::to_owned).collect()).unwrap_or_default()
}

/// Those who sign, from the PEM file of a key of the configuration. Errors: [`SecureError`].
pub(crate) fn roots(key: &'static str, path: &Path) -> Result<RootCertStore, SecureError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(key, path)? {
        roots.add(certificate).map_err(|error| SecureError::BadCa { key, path: path.to_owned(), error })?;
    }
    Ok(roots)
}

/// The private key in a PEM file. Errors: [`SecureError`].
pub(crate) fn private_key(key: &'static str, path: &Path) -> Result<PrivateKeyDer<'static>, SecureError> {
    let pem = read(key, path)?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|_| SecureError::NotPem {
        key,
        path: path.to_owned(),
        what: "private key",
    })
}

/// All certificates in a PEM file, at least one. Errors: [`SecureError`].
pub(crate) fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, SecureError> {
    let pem = read(key, path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let found = found.ok().filter(|found| !found.is_empty());
    found.ok_or_else(|| SecureError::NotPem { key, path: path.to_owned(), what: "certificate" })
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, SecureError> {
    std::fs::read(path).map_err(|error| SecureError::Unreadable { key, path: path.to_owned(), error })
}
