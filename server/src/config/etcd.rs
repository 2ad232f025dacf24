//! What the configuration says of a cluster of etcd, and what it must be together. Used by the main thread at the start.

use std::net::SocketAddr;
use std::time::Duration;

use super::{ClusterMode, Config, StoreKind, is_node_name};
use crate::etcd::access::{Access, Login, Tls};
use crate::etcd::gateway::BadEndpoint;
use crate::etcd::{Endpoint, EtcdOptions};

/// Why the keys do not make a node of such a cluster. Each is one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EtcdKeyError {
    #[error("etcd.endpoints is empty: it lists the servers of etcd, http://HOST:PORT or https://HOST:PORT each")]
    NoEndpoint,
    #[error("etcd.endpoints: {0}")]
    Endpoint(#[from] BadEndpoint),
    #[error("etcd.ca is empty: {0} names the PEM file of who signed the certificate of etcd there")]
    NoCa(&'static str),
    #[error(
        "etcd.endpoints: {0} is without TLS, and etcd.ca is set: name https:// endpoints alone, or leave etcd.ca empty"
    )]
    Plain(String),
    #[error("{0} is set, and {1} is empty: they go together")]
    Half(&'static str, &'static str),
    #[error("{0}")]
    Files(String),
    #[error("etcd.prefix = {0:?}: a / first and none last, and no white space or control character")]
    Prefix(String),
    #[error(
        "node.name = {0:?} is no name for a node of a cluster: lower-case letters, digits and -, at most 63, a letter first and \
         no - last"
    )]
    Name(String),
    #[error("cluster.mode = etcd needs cluster.listen, where other nodes connect to this one")]
    NoListen,
    #[error("other nodes can't connect to {0}: name the address of this machine in cluster.advertise")]
    Everywhere(SocketAddr),
    #[error("clients can't connect to {0}: name the address of this machine in net.advertise")]
    ClientsEverywhere(SocketAddr),
    #[error("cluster.mode = etcd needs store.kind = postgres: who takes over has to find what was accepted")]
    Store,
    #[error(
        "cluster.nodes lists nodes, and cluster.mode = etcd finds them in etcd: leave it empty, or use mode static"
    )]
    Listed,
}

/// Checks the keys; nothing is looked at without etcd.
pub(super) fn check(config: &Config) -> Result<(), EtcdKeyError> {
    if config.cluster_mode != ClusterMode::Etcd {
        return Ok(());
    }
    config.etcd_keys()?;
    if !is_node_name(&config.node_name) {
        return Err(EtcdKeyError::Name(config.node_name.clone()));
    }
    let address = config.peer_address().ok_or(EtcdKeyError::NoListen)?;
    if address.ip().is_unspecified() {
        return Err(EtcdKeyError::Everywhere(address));
    }
    if config.net_listen.ip().is_unspecified() && config.net_advertise.is_empty() {
        return Err(EtcdKeyError::ClientsEverywhere(config.net_listen));
    }
    if config.store_kind != StoreKind::Postgres {
        return Err(EtcdKeyError::Store);
    }
    if !config.cluster_nodes.is_empty() {
        return Err(EtcdKeyError::Listed);
    }
    Ok(())
}

impl Config {
    /// Where etcd is and how it is reached; reads the certificates. Errors: those of the keys and the files.
    pub fn etcd(&self) -> Result<EtcdOptions, EtcdKeyError> {
        let options = self.etcd_keys()?;
        let tls = if self.etcd_ca.is_empty() {
            None
        } else {
            Some(Tls::load(&self.etcd_ca, (&self.etcd_cert, &self.etcd_key)).map_err(EtcdKeyError::Files)?)
        };
        Ok(EtcdOptions { access: Access { tls, ..options.access }, ..options })
    }

    /// The same without the certificates, as far as the keys alone tell.
    fn etcd_keys(&self) -> Result<EtcdOptions, EtcdKeyError> {
        let endpoints: Vec<Endpoint> =
            self.etcd_endpoints.iter().map(|text| text.parse()).collect::<Result<_, BadEndpoint>>()?;
        if endpoints.is_empty() {
            return Err(EtcdKeyError::NoEndpoint);
        }
        let prefix = &self.etcd_prefix;
        let odd = |letter: char| letter.is_whitespace() || letter.is_control();
        if !prefix.starts_with('/') || prefix.ends_with('/') || prefix.contains(odd) {
            return Err(EtcdKeyError::Prefix(prefix.clone()));
        }
        self.check_access(&endpoints)?;
        let login = Login { user: self.etcd_username.clone(), password_file: self.etcd_password_file.clone().into() };
        let access = Access { tls: None, login: (!self.etcd_username.is_empty()).then_some(login) };
        let timeout = Duration::from_millis(self.etcd_timeout_ms);
        Ok(EtcdOptions { endpoints, prefix: prefix.clone(), timeout, access })
    }

    fn check_access(&self, endpoints: &[Endpoint]) -> Result<(), EtcdKeyError> {
        let pairs = [
            (("etcd.cert", &self.etcd_cert), ("etcd.key", &self.etcd_key)),
            (("etcd.username", &self.etcd_username), ("etcd.password_file", &self.etcd_password_file)),
        ];
        for ((one, first), (other, second)) in pairs {
            match (first.is_empty(), second.is_empty()) {
                (false, true) => return Err(EtcdKeyError::Half(one, other)),
                (true, false) => return Err(EtcdKeyError::Half(other, one)),
                (true, true) | (false, false) => {}
            }
        }
        if !self.etcd_ca.is_empty() {
            let plain = endpoints.iter().find(|endpoint| !endpoint.is_tls());
            return plain.map_or(Ok(()), |plain| Err(EtcdKeyError::Plain(plain.to_string())));
        }
        if endpoints.iter().any(Endpoint::is_tls) {
            return Err(EtcdKeyError::NoCa("with https:// in etcd.endpoints it"));
        }
        if !self.etcd_cert.is_empty() {
            return Err(EtcdKeyError::NoCa("with etcd.cert it"));
        }
        Ok(())
    }

    /// Where other nodes are told to connect, in a cluster of etcd.
    pub fn peer_address(&self) -> Option<SocketAddr> {
        self.cluster_advertise.or(self.cluster_listen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigError;

    const GOOD: &str = "[node]\nname = \"a\"\n[store]\nkind = \"postgres\"\n[postgres]\nurl = \"postgres://h/x\"\n[cluster]\n\
        mode = \"etcd\"\ntls = \"off\"\nlisten = \"127.0.0.1:9800\"\n";

    /// What is said of the good keys with one thing changed, and this at the end.
    fn told(from: &str, to: &str, rest: &str) -> EtcdKeyError {
        assert!(GOOD.contains(from));
        match Config::parse(&format!("{}{rest}", GOOD.replace(from, to))) {
            Err(ConfigError::Etcd(error)) => error,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_mistake_has_its_error() {
        let config = Config::parse(GOOD).unwrap();
        let etcd = config.etcd().unwrap();
        assert_eq!((etcd.nodes(), etcd.key_of("a")), ("/ringline/nodes/".into(), "/ringline/nodes/a".into()));
        assert_eq!(config.peer_address(), config.cluster_listen);
        let same = "mode = \"etcd\"";
        assert_eq!(told(same, same, "[etcd]\nendpoints = []\n"), EtcdKeyError::NoEndpoint);
        let etcd = |lines: &str| told(same, same, &format!("[etcd]\n{lines}\n"));
        let secure = "endpoints = [\"https://h:1\"]\nca = \"ca.pem\"";
        assert!(matches!(etcd("endpoints = [\"https://h:1\"]"), EtcdKeyError::NoCa(_)));
        assert_eq!(etcd("ca = \"ca.pem\""), EtcdKeyError::Plain("http://127.0.0.1:2379".into()));
        assert!(matches!(etcd("cert = \"a.pem\"\nkey = \"a.key\""), EtcdKeyError::NoCa(_)));
        for (line, one, other) in [
            ("cert = \"a.pem\"", "etcd.cert", "etcd.key"),
            ("key = \"a.key\"", "etcd.key", "etcd.cert"),
            ("username = \"ringline\"", "etcd.username", "etcd.password_file"),
            ("password_file = \"p\"", "etcd.password_file", "etcd.username"),
        ] {
            assert_eq!(etcd(&format!("{secure}\n{line}")), EtcdKeyError::Half(one, other));
        }
        // Files are looked at when they are used.
        let config = Config::parse(&format!("{GOOD}[etcd]\n{secure}\n")).unwrap();
        assert!(matches!(config.etcd(), Err(EtcdKeyError::Files(told)) if told.starts_with("etcd.ca: ")));
        let login = "[etcd]\nendpoints = [\"http://192.0.2.1:1\"]\nusername = \"ringline\"\npassword_file = \"p\"\n";
        let options = Config::parse(&format!("{GOOD}{login}")).unwrap().etcd().unwrap();
        assert_eq!(options.open_login().map(ToString::to_string), Some("http://192.0.2.1:1".into()));
        for prefix in ["ringline", "/ringline/", "/", "/a b"] {
            assert_eq!(
                told(same, same, &format!("[etcd]\nprefix = \"{prefix}\"\n")),
                EtcdKeyError::Prefix(prefix.into())
            );
        }
        assert_eq!(told("\"a\"", "\"A\"", ""), EtcdKeyError::Name("A".into()));
        assert_eq!(told("listen = \"127.0.0.1:9800\"", "", ""), EtcdKeyError::NoListen);
        let everywhere = told("127.0.0.1:9800", "0.0.0.0:9800", "");
        assert!(matches!(everywhere, EtcdKeyError::Everywhere(_)), "{everywhere}");
        let clients = told(same, same, "[net]\nlisten = \"0.0.0.0:9700\"\n");
        assert!(matches!(clients, EtcdKeyError::ClientsEverywhere(_)), "{clients}");
        assert_eq!(told("\"postgres\"", "\"embedded\"", ""), EtcdKeyError::Store);
        let nodes = "nodes = [{ name = \"a\", peer_address = \"127.0.0.1:1\", client_address = \"a:1\" }]\n";
        assert_eq!(told(same, same, nodes), EtcdKeyError::Listed);
        let open = GOOD.replace("127.0.0.1:9800", "192.0.2.1:9800");
        assert!(matches!(Config::parse(&open), Err(ConfigError::Cluster(_))), "links without TLS stay on loopback");
    }
}
