//! The lists of nodes and pods, and the arrivals that a seed makes of them.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use anyhow::Context as _;
use ebb_lab::bench::chance::Chance;

/// A whole GPU, in the lists' unit.
pub const WHOLE: u32 = 1000;
/// Arrivals ask for this part of the cluster's GPUs in all; 100 % of them count.
const PADDED_PERCENT: u64 = 130;

/// A node.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// MiB.
    pub memory_mib: u64,
    /// Free thousandths of each GPU.
    pub gpus: Vec<u32>,
    /// The GPUs' type.
    pub card: String,
}

/// What a pod asks. Pods that ask the same are of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind {
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// MiB.
    pub memory_mib: u64,
    /// GPUs.
    pub gpus: u32,
    /// Thousandths of each of them.
    pub gpu_milli: u32,
    /// Types of GPU that will do; empty: all.
    pub cards: BTreeSet<String>,
}

impl Kind {
    /// Thousandths of a GPU on all its GPUs together.
    pub fn asks(&self) -> u64 {
        u64::from(self.gpus) * u64::from(self.gpu_milli)
    }

    /// Whether this type of GPU will do.
    pub fn takes_card(&self, card: &str) -> bool {
        self.gpus == 0 || self.cards.is_empty() || self.cards.contains(card)
    }
}

/// Both lists.
pub struct Lists {
    /// The nodes, empty.
    pub machines: Vec<Machine>,
    /// What the pods ask, each once.
    pub kinds: Vec<Kind>,
    /// The pods, by position of their kind.
    pub pods: Vec<usize>,
}

/// What one seed makes of the lists.
pub struct Arrivals {
    /// The nodes in the order of their names.
    pub machines: Vec<Machine>,
    /// Kinds of the pods as they come.
    pub pods: Vec<usize>,
}

impl Lists {
    /// Reads both files.
    ///
    /// # Errors
    /// Names the file, and what is wrong with it.
    pub fn read(nodes: &Path, pods: &Path) -> anyhow::Result<Lists> {
        let machines: Vec<Machine> =
            Table::read(nodes, &["cpu_milli", "memory_mib", "gpu", "model"])?.rows(|row| {
                Ok(Machine {
                    cpu_milli: row.number("cpu_milli")?,
                    memory_mib: row.number("memory_mib")?,
                    gpus: vec![WHOLE; usize::try_from(row.number("gpu")?)?],
                    card: row.text("model").to_owned(),
                })
            })?;
        let columns = ["cpu_milli", "memory_mib", "num_gpu", "gpu_milli", "gpu_spec"];
        let asked: Vec<Kind> = Table::read(pods, &columns)?.rows(|row| {
            let gpus = u32::try_from(row.number("num_gpu")?)?;
            let cards = row.text("gpu_spec").split('|').filter(|card| !card.is_empty());
            Ok(Kind {
                cpu_milli: row.number("cpu_milli")?,
                memory_mib: row.number("memory_mib")?,
                gpus,
                gpu_milli: if gpus == 0 {
                    0
                } else {
                    u32::try_from(row.number("gpu_milli")?)?
                },
                cards: cards.map(str::to_owned).collect(),
            })
        })?;
        anyhow::ensure!(
            machines.iter().any(|machine| !machine.gpus.is_empty()),
            "no node has a GPU"
        );
        anyhow::ensure!(asked.iter().any(|kind| kind.asks() > 0), "no pod asks for a GPU");
        let (mut kinds, mut known): (Vec<Kind>, HashMap<Kind, usize>) = Default::default();
        let pods = asked.into_iter().map(|kind| {
            *known.entry(kind.clone()).or_insert_with(|| {
                kinds.push(kind);
                kinds.len() - 1
            })
        });
        let pods = pods.collect();
        Ok(Lists {
            machines,
            kinds,
            pods,
        })
    }

    /// GPUs of all nodes.
    pub fn gpus(&self) -> usize {
        self.machines.iter().map(|machine| machine.gpus.len()).sum()
    }

    /// Pads and shuffles the pods, and gives the nodes their order.
    pub fn arrivals(&self, seed: u64) -> Arrivals {
        let mut chance = Chance::new(seed);
        let asks = |pods: &[usize]| pods.iter().map(|kind| self.kinds[*kind].asks()).sum::<u64>();
        let goal = self.gpus() as u64 * u64::from(WHOLE) * PADDED_PERCENT / 100;
        let mut pods = self.pods.clone();
        let mut asked = asks(&pods);
        while asked < goal {
            let drawn = self.pods[chance.below(self.pods.len())];
            asked += self.kinds[drawn].asks();
            pods.push(drawn);
        }
        chance.shuffle(&mut pods);
        let mut machines = self.machines.clone();
        chance.shuffle(&mut machines);
        Arrivals { machines, pods }
    }
}

/// A CSV file without quotes.
struct Table {
    name: String,
    header: HashMap<String, usize>,
    text: String,
}

struct Row<'t> {
    header: &'t HashMap<String, usize>,
    fields: Vec<&'t str>,
}

impl Table {
    fn read(file: &Path, columns: &[&str]) -> anyhow::Result<Table> {
        let name = file.display().to_string();
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read {name}; --help says where it comes from"))?;
        let first = text.lines().next().unwrap_or_default();
        let header: HashMap<String, usize> = first
            .split(',')
            .map(|name| name.trim().to_owned())
            .zip(0..)
            .collect();
        for column in columns {
            anyhow::ensure!(
                header.contains_key(*column),
                "{name} has no column {column}; --help says which it needs"
            );
        }
        Ok(Table { name, header, text })
    }

    fn rows<T>(&self, read: impl Fn(&Row<'_>) -> anyhow::Result<T>) -> anyhow::Result<Vec<T>> {
        let lines = self
            .text
            .lines()
            .enumerate()
            .skip(1)
            .filter(|(_, line)| !line.trim().is_empty());
        lines
            .map(|(number, line)| {
                let fields = line.split(',').map(str::trim).collect();
                read(&Row {
                    header: &self.header,
                    fields,
                })
                .with_context(|| format!("{}, line {}", self.name, number + 1))
            })
            .collect()
    }
}

impl Row<'_> {
    fn text(&self, column: &str) -> &str {
        let field = self.header.get(column).and_then(|place| self.fields.get(*place));
        field.copied().unwrap_or_default()
    }

    fn number(&self, column: &str) -> anyhow::Result<u64> {
        let text = self.text(column);
        text.parse()
            .with_context(|| format!("{column} is `{text}`, which is no whole number"))
    }
}
