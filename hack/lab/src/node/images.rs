//! Which program stands for which container image.

use super::lock;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// The image table of a set of nodes; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Images {
    table: Arc<Mutex<BTreeMap<String, PathBuf>>>,
}

/// A command line, ready to be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    /// The program file.
    pub program: PathBuf,
    /// Its arguments, without the program's name.
    pub args: Vec<String>,
}

impl Images {
    /// Lets `program` stand for `image`.
    pub fn insert(&self, image: impl Into<String>, program: impl Into<PathBuf>) {
        lock(&self.table).insert(image.into(), program.into());
    }

    /// The program that stands for `image`, if the image "is there".
    pub fn program(&self, image: &str) -> Option<PathBuf> {
        lock(&self.table).get(image).cloned()
    }

    /// All images, for the node's status.
    pub fn names(&self) -> Vec<String> {
        lock(&self.table).keys().cloned().collect()
    }

    /// Reads `NAME=PATH`.
    ///
    /// # Errors
    /// Says what is wrong with the text.
    pub fn add_text(&self, text: &str) -> Result<(), String> {
        let (name, path) = text
            .rsplit_once('=')
            .filter(|(name, path)| !name.is_empty() && !path.is_empty())
            .ok_or_else(|| format!("image {text:?}: write NAME=PATH"))?;
        self.insert(name, path);
        Ok(())
    }
}

/// The command line of a container whose image is `program`.
///
/// `command` replaces the image's entry point as in a pod spec. A command that names the image's own
/// program (`ebb`, or `/usr/local/bin/ebb` where no such file exists here) is that program.
///
/// # Errors
/// The runtime's message for a command that is not there.
pub fn command_line(program: &Path, command: &[String], args: &[String]) -> Result<CommandLine, String> {
    let Some((first, rest)) = command.split_first() else {
        return Ok(CommandLine {
            program: program.to_owned(),
            args: args.to_vec(),
        });
    };
    let wanted = Path::new(first);
    let is_the_program = wanted.file_name() == program.file_name();
    let found = if first.contains('/') {
        if wanted.is_file() {
            Some(wanted.to_owned())
        } else {
            is_the_program.then(|| program.to_owned())
        }
    } else if is_the_program {
        Some(program.to_owned())
    } else {
        std::env::split_paths(super::process::PATH)
            .map(|dir| dir.join(first))
            .find(|path| path.is_file())
    };
    let program = found.ok_or_else(|| format!("exec: {first:?}: executable file not found in $PATH"))?;
    Ok(CommandLine {
        program,
        args: rest.iter().chain(args).cloned().collect(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn the_table_is_read_from_text() {
        let images = Images::default();
        images
            .add_text("registry.k8s.io/kube-scheduler:v1=/bin/true")
            .unwrap();
        assert_eq!(
            images.program("registry.k8s.io/kube-scheduler:v1").unwrap(),
            Path::new("/bin/true")
        );
        assert!(images.program("other").is_none());
        assert!(images.add_text("name").is_err() && images.add_text("=x").is_err());
    }

    #[test]
    fn commands_are_looked_up_as_in_an_image() {
        let program = Path::new("/somewhere/ebb");
        let line = |command: &str, args: &str| command_line(program, &words(command), &words(args));
        assert_eq!(
            line("", "gate --x").unwrap(),
            CommandLine {
                program: program.into(),
                args: words("gate --x")
            }
        );
        assert_eq!(
            line("ebb gate", "--x").unwrap(),
            CommandLine {
                program: program.into(),
                args: words("gate --x")
            }
        );
        assert_eq!(line("/usr/local/bin/ebb", "").unwrap().program, program);
        assert_eq!(line("sh -c", "true").unwrap().args, words("-c true"));
        assert!(
            line("no-such-program", "")
                .unwrap_err()
                .contains("not found in $PATH")
        );
    }
}
