//! All nodes by name: of each its page, and beside all others' its row.

use std::collections::HashMap;

use foldhash::fast::FixedState;

use super::node::NodeState;
use super::row::Row;
use crate::api::units::NodeName;

/// Pages and rows. A node's are at the same place in both lists.
#[derive(Clone, Debug, Default)]
pub(super) struct Nodes {
    // Names are the administrators' own, so a fast hash will do.
    places: HashMap<NodeName, usize, FixedState>,
    pages: Vec<NodeState>,
    rows: Vec<Row>,
}

/// The same pages by name, in whatever order they came.
impl PartialEq for Nodes {
    fn eq(&self, other: &Self) -> bool {
        self.pages.len() == other.pages.len()
            && self
                .pages
                .iter()
                .all(|page| other.get(page.name().as_str()) == Some(page))
    }
}

impl Nodes {
    pub(super) fn get(&self, name: &str) -> Option<&NodeState> {
        self.places.get(name).map(|place| &self.pages[*place])
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &NodeState> {
        self.pages.iter()
    }

    /// The node of each name, where it is known: its row and its page.
    pub(super) fn find<'n, 'a>(
        &'n self,
        names: impl Iterator<Item = &'a str>,
    ) -> Vec<Option<(&'n Row, &'n NodeState)>> {
        names
            .map(|name| {
                let place = *self.places.get(name)?;
                Some((&self.rows[place], &self.pages[place]))
            })
            .collect()
    }

    /// Changes the page of this node, which is made where there is none, and copies its row. A page that is blank
    /// after that is thrown away.
    pub(super) fn change<R>(
        &mut self,
        name: &NodeName,
        new: impl FnOnce() -> NodeState,
        change: impl FnOnce(&mut NodeState) -> R,
    ) -> R {
        let place = *self.places.entry(name.clone()).or_insert_with(|| {
            let page = new();
            self.rows.push(page.row().clone());
            self.pages.push(page);
            self.pages.len() - 1
        });
        let page = &mut self.pages[place];
        let result = change(page);
        if page.blank() {
            self.pages.swap_remove(place);
            self.rows.swap_remove(place);
            self.places.remove(name);
            if let Some(moved) = self.pages.get(place) {
                self.places.insert(moved.name().clone(), place);
            }
        } else {
            self.rows[place].clone_from(page.row());
        }
        result
    }
}
