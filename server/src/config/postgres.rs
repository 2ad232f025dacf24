//! What the configuration says of the PostgreSQL store, and what does not go with it. Used by the main thread at the start.

use super::{Bounds, ClusterMode, Config, ConfigError, Setting, StoreKind, quoted};

/// Where a database is. It may hold a password: what is printed of it does not.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct DatabaseUrl(pub String);

impl std::fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.to_toml().fmt(f)
    }
}

impl Setting for DatabaseUrl {
    fn parse(text: &str, _: Bounds) -> Option<Self> {
        Some(Self(text.to_owned()))
    }

    fn to_toml(&self) -> String {
        quoted(&ringline_store::postgres::without_password(&self.0))
    }
}

/// What no single key can say.
pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    if config.store_kind != StoreKind::Postgres {
        return Ok(());
    }
    let conflict = |text: &str| Err(ConfigError::Conflict(text.to_owned()));
    if config.postgres_url.0.is_empty() {
        return conflict("store.kind = postgres needs postgres.url, like postgres://ringline@127.0.0.1/ringline");
    }
    if config.cluster_mode == ClusterMode::Static {
        return conflict(
            "store.kind = postgres serves a node alone or a cluster of etcd: cluster.mode must be none or etcd, or store.kind \
             embedded",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_go_with_a_database_is_refused_and_passwords_are_not_shown() {
        let load = |text: &str| Config::parse(&format!("[store]\nkind = \"postgres\"\n{text}"));
        let told = |text: &str| load(text).unwrap_err().to_string();
        let url = "[postgres]\nurl = \"postgres://ann:s3cret@h/x\"\n";
        assert!(told("").contains("needs postgres.url"));
        for key in ["age_hours", "size_bytes", "messages"] {
            assert!(load(&format!("{url}[retention]\n{key} = 1000\n")).is_ok(), "{key}");
        }
        let listed = told(&format!("{url}[cluster]\nmode = \"static\"\n"));
        assert!(listed.contains("cluster.mode must be none") && !listed.contains("s3cret"), "{listed}");
        let config = load(url).unwrap();
        assert_eq!(config.postgres_url.0, "postgres://ann:s3cret@h/x");
        for text in [config.to_toml(), config.show(), format!("{config:?}")] {
            assert!(text.contains("postgres://ann@h/x") && !text.contains("s3cret"), "{text}");
        }
    }
}
