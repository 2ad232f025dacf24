//! Under which list of nodes a data folder was filled. Who owns what follows from the names and weights in the list, so under
//! another one a node would be asked for what it does not have, and have what nobody asks it for. Used by the start.
//!
//! A folder of a node alone needs no note; one without a note that is not new was filled by a node alone.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::config::{ClusterMode, Config, StoreKind};

const PLACEMENT_FILE: &str = "placement";
/// The store's own first file: there, the folder is not new.
const FORMAT_FILE: &str = "ringline-data";
const ALONE: &str = "a node alone";

/// Why a start goes no further.
#[derive(Debug, thiserror::Error)]
pub enum PlacedError {
    #[error(
        "{dir} was filled by {then}, the configuration says {now}, and who owns what follows from that: \
         go back to it, or begin with an empty data directory",
        dir = dir.display()
    )]
    Changed { dir: PathBuf, then: String, now: String },
    #[error("{path}: {error}", path = path.display())]
    Io { path: PathBuf, error: io::Error },
}

/// What is to be noted once the store has taken the folder.
#[derive(Debug)]
pub struct Placed {
    path: PathBuf,
    note: Option<String>,
}

impl Placed {
    /// Compares the configuration with the folder, before the store opens it. Errors: [`PlacedError`]; nothing was changed.
    pub fn check(config: &Config) -> Result<Self, PlacedError> {
        let path = config.data_dir.join(PLACEMENT_FILE);
        // Neither keeps messages there.
        if matches!(config.store_kind, StoreKind::Memory | StoreKind::Postgres) {
            return Ok(Self { path, note: None });
        }
        let now = said(config);
        let then = match fs::read_to_string(&path) {
            Ok(text) => Some(text.trim_end().to_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                config.data_dir.join(FORMAT_FILE).exists().then(|| ALONE.to_owned())
            }
            Err(error) => return Err(PlacedError::Io { path, error }),
        };
        if let Some(then) = then.as_ref().filter(|then| **then != now) {
            return Err(PlacedError::Changed { dir: config.data_dir.clone(), then: then.clone(), now });
        }
        let note = (then.is_none() && now != ALONE).then_some(now);
        Ok(Self { path, note })
    }

    /// Notes the list in a folder that is new; durable when it returns.
    pub fn keep(self) -> Result<(), PlacedError> {
        let Some(note) = self.note else { return Ok(()) };
        write(&self.path, &note).map_err(|error| PlacedError::Io { path: self.path, error })
    }
}

fn write(path: &Path, note: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    writeln!(file, "{note}")?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    let folder = path.parent().unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

/// The configuration's say on who owns what.
fn said(config: &Config) -> String {
    if config.cluster_mode != ClusterMode::Static {
        return ALONE.to_owned();
    }
    let mut nodes: Vec<_> =
        config.cluster_nodes.iter().map(|node| format!("{} weight {}", node.name, node.weight)).collect();
    nodes.sort();
    format!("node {} of {}", config.node_name, nodes.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ClusterNode;

    fn node(name: &str, weight: u32) -> ClusterNode {
        let (name, client_address) = (name.to_owned(), "127.0.0.1:9700".to_owned());
        ClusterNode { name, peer_address: "127.0.0.1:9800".parse().unwrap(), client_address, weight, client_weight: 1 }
    }

    fn start(config: &Config) -> Result<(), PlacedError> {
        let placed = Placed::check(config)?;
        fs::write(config.data_dir.join(FORMAT_FILE), "").unwrap();
        placed.keep()
    }

    fn with(config: &Config, change: impl FnOnce(&mut Config)) -> Config {
        let mut config = config.clone();
        change(&mut config);
        config
    }

    fn alone(folder: &Path) -> Config {
        with(&Config::default(), |config| {
            config.data_dir = folder.to_owned();
            config.node_name = "b".into();
        })
    }

    fn listed(config: &Config, nodes: &[ClusterNode]) -> Config {
        with(config, |config| {
            config.cluster_mode = ClusterMode::Static;
            config.cluster_nodes = nodes.to_vec();
        })
    }

    #[test]
    fn a_folder_is_only_opened_under_the_list_that_filled_it() {
        let folder = tempfile::tempdir().unwrap();
        let alone = alone(folder.path());
        let config = listed(&alone, &[node("b", 1), node("a", 2)]);
        start(&config).unwrap();
        let moved = ClusterNode { client_address: "elsewhere:1".into(), client_weight: 9, ..node("a", 2) };
        start(&listed(&alone, &[moved, node("b", 1)]))
            .expect("order, addresses and weights for clients decide nothing");

        let refused = |config: &Config| start(config).unwrap_err().to_string();
        let told = refused(&listed(&alone, &[node("a", 1), node("b", 1)]));
        assert!(told.contains("node b of a weight 2, b weight 1") && told.contains("a weight 1, b weight 1"), "{told}");
        refused(&listed(&alone, &[node("a", 2), node("b", 1), node("c", 1)]));
        refused(&with(&config, |config| config.node_name = "a".into()));
        refused(&alone);
        start(&config).expect("a refusal changes nothing");
        let forgetful = with(&listed(&alone, &[node("b", 9)]), |config| config.store_kind = StoreKind::Memory);
        start(&forgetful).expect("nothing is kept there");
    }

    #[test]
    fn a_folder_of_a_node_alone_stays_one() {
        let folder = tempfile::tempdir().unwrap();
        let alone = alone(folder.path());
        start(&alone).unwrap();
        start(&alone).unwrap();
        assert!(!folder.path().join(PLACEMENT_FILE).exists());
        let told = start(&listed(&alone, &[node("a", 1), node("b", 1)]));
        assert!(matches!(told, Err(PlacedError::Changed { then, .. }) if then == ALONE));
    }
}
