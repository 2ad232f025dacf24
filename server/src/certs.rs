//! `ringline certs`: a certificate authority for development and small clusters, the certificates of nodes, and the key that
//! signs login tokens at all of them. Runs once, on the main thread.
//!
//! A node's certificate carries the node's name as a DNS name (subject alternative name), and may be used by either side of
//! a connection. Whoever runs an authority of their own only has to keep to that. Keys are written readable by their owner
//! alone, and nothing is ever overwritten.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use crate::auth::{self, AuthError, ISSUER_FILE, ISSUER_PUBLIC_FILE};
use crate::config::{NODE_NAME_BYTES_MAX, is_node_name};

/// Name of the authority in its certificate.
const AUTHORITY: &str = "Ringline cluster CA";
/// What is in the folder beside the files of nodes: no node is called so.
const RESERVED: [&str; 2] = ["ca", "issuer"];
const DAYS_DEFAULT: u64 = 3_650;
const DAYS_MAX: u64 = 36_500;
const DAY: Duration = Duration::from_secs(86_400);

#[derive(Debug, Subcommand)]
pub enum CertsCommand {
    /// Make a certificate authority, the certificates of nodes, and an issuer key for tokens, in a new or empty folder.
    Init(CertsArgs),
    /// Sign certificates of more nodes by the authority in a folder.
    Add(CertsArgs),
}

#[derive(Debug, Args)]
pub struct CertsArgs {
    /// Folder of ca.pem, ca.key, issuer.pem, and NODE.pem and NODE.key of each node.
    dir: PathBuf,
    /// Names of the nodes, as in node.name.
    #[arg(long, value_delimiter = ',', required = true, value_name = "NAME,…")]
    nodes: Vec<String>,
    /// How long the certificates are valid.
    #[arg(long, default_value_t = DAYS_DEFAULT, value_parser = clap::value_parser!(u64).range(1..=DAYS_MAX))]
    days: u64,
}

/// Why no certificates were made. Each is one line.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    #[error(
        "{0:?} is no name for a node: lower-case letters, digits and -, at most {NODE_NAME_BYTES_MAX}, a letter first and no - \
         last"
    )]
    BadName(String),
    #[error("files of the cluster are called {0:?} here; choose another name for the node")]
    Reserved(String),
    #[error("node {0:?} is named twice")]
    Twice(String),
    #[error("{path} exists: nothing was written; take it away, or choose another folder", path = .0.display())]
    Exists(PathBuf),
    #[error("{path}: {error}", path = path.display())]
    File { path: PathBuf, error: io::Error },
    #[error("{path} is not the key of an authority: {error}", path = path.display())]
    Key { path: PathBuf, error: rcgen::Error },
    #[error("a certificate could not be made: {0}")]
    Make(#[from] rcgen::Error),
    #[error(transparent)]
    Issuer(#[from] AuthError),
}

/// A file to be written.
struct Output {
    path: PathBuf,
    text: String,
    secret: bool,
}

/// Runs the command. The result is the exit code; errors are one line.
pub fn run(command: &CertsCommand) -> Result<u8, String> {
    let (args, new) = match command {
        CertsCommand::Init(args) => (args, true),
        CertsCommand::Add(args) => (args, false),
    };
    make(&args.dir, &args.nodes, (args.days, new)).map_err(|error| error.to_string())?;
    let dir = args.dir.display();
    for node in &args.nodes {
        println!(
            "[cluster] of node {node}:  ca = \"{dir}/ca.pem\"  cert = \"{dir}/{node}.pem\"  key = \"{dir}/{node}.key\""
        );
    }
    println!("[auth] of every node:  issuer = \"{dir}/{ISSUER_FILE}\"");
    println!("Give each node ca.pem, {ISSUER_FILE} and its own two files; keep ca.key away from all of them.");
    Ok(0)
}

/// Makes the files. `new`: with a new authority, otherwise by the one that is there.
///
/// Errors: [`CertsError`]; when a file exists nothing is written.
pub fn make(dir: &Path, nodes: &[String], (days, new): (u64, bool)) -> Result<(), CertsError> {
    check_names(nodes)?;
    let file = |name: &str| dir.join(name);
    let mut outputs = Vec::new();
    let key = if new {
        let key = KeyPair::generate()?;
        let authority = authority(days)?.self_signed(&key)?;
        outputs.push(Output { path: file("ca.key"), text: key.serialize_pem(), secret: true });
        outputs.push(Output { path: file("ca.pem"), text: authority.pem(), secret: false });
        let issuer = auth::KeyPair::generate()?;
        outputs.push(Output { path: file(ISSUER_FILE), text: issuer.private, secret: true });
        outputs.push(Output { path: file(ISSUER_PUBLIC_FILE), text: issuer.public, secret: false });
        key
    } else {
        let path = file("ca.key");
        let text = std::fs::read_to_string(&path).map_err(|error| CertsError::File { path: path.clone(), error })?;
        KeyPair::from_pem(&text).map_err(|error| CertsError::Key { path, error })?
    };
    let params = authority(days)?;
    let issuer = Issuer::from_params(&params, &key);
    for node in nodes {
        let key = KeyPair::generate()?;
        let certificate = certificate_of(node, days)?.signed_by(&key, &issuer)?;
        outputs.push(Output { path: file(&format!("{node}.key")), text: key.serialize_pem(), secret: true });
        outputs.push(Output { path: file(&format!("{node}.pem")), text: certificate.pem(), secret: false });
    }
    if let Some(output) = outputs.iter().find(|output| output.path.exists()) {
        return Err(CertsError::Exists(output.path.clone()));
    }
    let failed = |error| CertsError::File { path: dir.to_owned(), error };
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    outputs.iter().try_for_each(write)
}

fn check_names(nodes: &[String]) -> Result<(), CertsError> {
    for (at, node) in nodes.iter().enumerate() {
        if !is_node_name(node) {
            return Err(CertsError::BadName(node.clone()));
        }
        if RESERVED.contains(&node.as_str()) {
            return Err(CertsError::Reserved(node.clone()));
        }
        if nodes.iter().skip(at + 1).any(|other| other == node) {
            return Err(CertsError::Twice(node.clone()));
        }
    }
    Ok(())
}

fn authority(days: u64) -> Result<CertificateParams, rcgen::Error> {
    let mut params = valid(CertificateParams::new(Vec::new())?, days);
    params.distinguished_name = named(AUTHORITY);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn certificate_of(node: &str, days: u64) -> Result<CertificateParams, rcgen::Error> {
    let mut params = valid(CertificateParams::new(vec![node.to_owned()])?, days);
    params.distinguished_name = named(node);
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// From a day ago, for clocks that are behind.
fn valid(mut params: CertificateParams, days: u64) -> CertificateParams {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(DAY);
    params.not_after = epoch + now + DAY.saturating_mul(u32::try_from(days).unwrap_or(u32::MAX));
    params
}

/// A new file, or an old one emptied, that its owner alone can read. Errors: the kernel's.
pub(crate) fn private_file(path: &Path) -> io::Result<std::fs::File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

fn write(Output { path, text, secret }: &Output) -> Result<(), CertsError> {
    let failed = |error| CertsError::File { path: path.clone(), error };
    let mode = if *secret { 0o600 } else { 0o644 };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::peers::secure::{Identity, SecureError};

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn load(dir: &Path, node: &str, own: &str) -> Result<Identity, SecureError> {
        let file = |name: String| dir.join(name);
        let (ca, cert, key) = (dir.join("ca.pem"), file(format!("{node}.pem")), file(format!("{node}.key")));
        Identity::load((&ca, &cert, &key), own)
    }

    #[test]
    fn every_node_gets_a_certificate_of_its_name_and_keys_are_private() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("certs");
        make(&dir, &names(&["a", "node-2"]), (30, true)).unwrap();
        let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(dir.clone()), 0o700);
        for key in ["ca.key", "a.key", "node-2.key", ISSUER_FILE] {
            assert_eq!(mode(dir.join(key)), 0o600, "{key}");
        }
        auth::Issuer::open(&dir.join(ISSUER_FILE)).unwrap();
        let issuer = std::fs::read(dir.join(ISSUER_FILE)).unwrap();
        load(&dir, "a", "a").unwrap();
        load(&dir, "node-2", "node-2").unwrap();
        let error = load(&dir, "a", "node-2").unwrap_err().to_string();
        assert!(error.contains("a.pem is a certificate for a, this node is \"node-2\""), "{error}");
        make(&dir, &names(&["c"]), (30, false)).unwrap();
        load(&dir, "c", "c").unwrap();
        assert_eq!(std::fs::read(dir.join(ISSUER_FILE)).unwrap(), issuer, "one issuer for all");
        std::fs::write(dir.join("c.key"), "rubbish").unwrap();
        assert!(load(&dir, "c", "c").unwrap_err().to_string().contains("no private key"));
        assert!(load(&dir, "d", "d").unwrap_err().to_string().contains("d.pem"));
    }

    #[test]
    fn nothing_is_overwritten_and_bad_names_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        make(dir, &names(&["a"]), (30, true)).unwrap();
        let before = std::fs::read(dir.join("a.key")).unwrap();
        assert!(matches!(make(dir, &names(&["b"]), (30, true)), Err(CertsError::Exists(_))));
        assert!(matches!(make(dir, &names(&["b", "a"]), (30, false)), Err(CertsError::Exists(_))));
        assert!(!dir.join("b.key").exists());
        assert_eq!(std::fs::read(dir.join("a.key")).unwrap(), before);
        assert!(matches!(make(dir, &names(&["B"]), (30, false)), Err(CertsError::BadName(_))));
        for name in RESERVED {
            assert!(matches!(make(dir, &names(&[name]), (30, false)), Err(CertsError::Reserved(_))), "{name}");
        }
        assert!(matches!(make(dir, &names(&["b", "b"]), (30, false)), Err(CertsError::Twice(_))));
        let empty = dir.join("empty");
        assert!(matches!(make(&empty, &names(&["b"]), (30, false)), Err(CertsError::File { .. })));
    }
}
