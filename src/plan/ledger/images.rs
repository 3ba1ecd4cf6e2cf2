//! Container images that nodes hold.

use std::hash::BuildHasher as _;
use std::sync::Arc;

use foldhash::fast::FixedState;

use crate::api::units::Bytes;

/// Names remembered of a node. The kubelet tells of 50 images by default, each by its tag and its digest.
const MOST: usize = 256;

/// An image's name, as 64 bits of its hash: thousands of nodes hold the same names, and nothing is asked of them but
/// whether they are equal. Two that are taken for one would cost a pull, and nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Image(u64);

impl Image {
    /// The image of that name. One without tag or digest is the latest, as for kube-scheduler.
    #[must_use]
    pub fn named(name: &str) -> Image {
        let hash = |name: &str| Image(FixedState::default().hash_one(name));
        if name.rfind(':') > name.rfind('/') {
            hash(name)
        } else {
            hash(&format!("{name}:latest"))
        }
    }
}

/// The images that a node holds, with their sizes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Images(Arc<[(Image, Bytes)]>);

impl Images {
    /// Images of these names and sizes; of very many, the largest.
    #[must_use]
    pub fn new<'a>(images: impl Iterator<Item = (&'a str, Bytes)>) -> Images {
        let mut images: Vec<(Image, Bytes)> = images.map(|(name, size)| (Image::named(name), size)).collect();
        images.sort_by_key(|(image, size)| (std::cmp::Reverse(*size), *image));
        images.truncate(MOST);
        images.sort();
        images.dedup_by_key(|(image, _)| *image);
        Images(images.into())
    }

    /// Bytes of these images that need not be pulled.
    #[must_use]
    pub fn held(&self, wanted: &[Image]) -> Bytes {
        let size = |image: &Image| {
            let found = self.0.binary_search_by_key(image, |(image, _)| *image);
            found.map_or(Bytes(0), |place| self.0[place].1)
        };
        wanted.iter().map(size).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_kube_scheduler_compares() {
        let node = Images::new(
            [
                ("registry:5000/vllm:latest", Bytes(7)),
                ("registry:5000/vllm@sha256:abc", Bytes(7)),
                ("tgi:3", Bytes(5)),
            ]
            .into_iter(),
        );
        let held = |names: &[&str]| {
            let images: Vec<Image> = names.iter().map(|name| Image::named(name)).collect();
            node.held(&images).0
        };
        assert_eq!(held(&["registry:5000/vllm"]), 7);
        assert_eq!(held(&["registry:5000/vllm@sha256:abc", "tgi:3"]), 12);
        assert_eq!(held(&["tgi", "tgi:4", "vllm"]), 0);
        assert_eq!(held(&[]), 0);
    }

    #[test]
    fn of_very_many_the_largest_are_remembered() {
        let names: Vec<String> = (0..1000).map(|number| format!("image:{number}")).collect();
        let images = Images::new(names.iter().map(String::as_str).zip((0..).map(Bytes)));
        assert_eq!(images.0.len(), MOST);
        assert_eq!(images.held(&[Image::named("image:999")]), Bytes(999));
        assert_eq!(images.held(&[Image::named("image:0")]), Bytes(0));
    }
}
