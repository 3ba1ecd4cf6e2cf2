//! Guards the layers: each module may use those before it, and decisions know no clock, no cluster and no IO.
//!
//! The texts are read, not the compiled program: what is refused is also a habit, and the message can
//! name the line.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// From the bottom up, as in the table of `src/lib.rs`. Modules of one row do not know each other.
const LAYERS: [&[&str]; 7] = [
    &["api"],
    &["plan"],
    &["link"],
    &["cluster"],
    &["serve"],
    &["webhook", "extender", "gate", "agent", "provider"],
    &["controller"],
];

/// Crates that `api` may use: what it takes to describe what people write.
const API_CRATES: &[&str] = &[
    "jiff",
    "k8s_openapi",
    "kube",
    "schemars",
    "serde",
    "serde_json",
    "serde_yaml_ng",
    "thiserror",
];

/// Crates that `plan` may use: data and its notation. None of them reaches a cluster or touches a file, and the one
/// that could tell the time (jiff) is kept from it by [`IMPURE`]. json-patch is what its tests apply patches with.
const PLAN_CRATES: &[&str] = &[
    "foldhash",
    "http",
    "jiff",
    "json_patch",
    "k8s_openapi",
    "serde",
    "serde_json",
    "smallvec",
    "thiserror",
];

/// What `api` may take from kube: the derive and its traits, never a client.
const KUBE_IN_API: &[&str] = &[
    "CustomResource",
    "CustomResourceExt",
    "KubeSchema",
    "Resource",
    "core",
];

/// Parts of std that are a clock, an environment or IO.
const IMPURE: &[&str] = &[
    "std::env",
    "std::fs",
    "std::process",
    "std::thread",
    "std::os",
    "std::io",
    "Instant",
    "SystemTime",
    "Timestamp::now",
    "Zoned::now",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "UnixStream",
    "println!",
    "eprintln!",
    "print!",
];

struct Source {
    /// `plan/gating.rs`
    name: String,
    /// `plan`
    module: String,
    raw: String,
    /// Without comments, texts and `#[cfg(test)]` modules; the lines are where they were.
    code: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut files): (Vec<PathBuf>, Vec<PathBuf>) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    let source = |path: PathBuf| {
        let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
        let raw = std::fs::read_to_string(&path).unwrap();
        let module = name.split('/').next().unwrap().trim_end_matches(".rs").to_owned();
        let code = without_tests(&bare(&raw));
        Source {
            name,
            module,
            raw,
            code,
        }
    };
    files.into_iter().map(source).collect()
}

/// The text with comments and literals blanked out, so that only code is left, on the same lines.
fn bare(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    let keep_lines = |out: &mut String, from: usize, to: usize| {
        out.extend(
            chars[from..to.min(chars.len())]
                .iter()
                .map(|c| if *c == '\n' { '\n' } else { ' ' }),
        );
    };
    while i < chars.len() {
        let start = i;
        let word_before = i > 0 && (at(i - 1).is_alphanumeric() || at(i - 1) == '_');
        if at(i) == '/' && at(i + 1) == '/' {
            while i < chars.len() && at(i) != '\n' {
                i += 1;
            }
        } else if at(i) == '/' && at(i + 1) == '*' {
            i += 2;
            while i < chars.len() && !(at(i) == '*' && at(i + 1) == '/') {
                i += 1;
            }
            i += 2;
        } else if at(i) == 'r'
            && !word_before
            && (at(i + 1) == '"' || at(i + 1) == '#' && matches!(at(i + 2), '"' | '#'))
        {
            let mut hashes = 0;
            i += 1;
            while at(i) == '#' {
                hashes += 1;
                i += 1;
            }
            i += 1;
            let end: String = std::iter::once('"')
                .chain(std::iter::repeat_n('#', hashes))
                .collect();
            while i < chars.len() && !chars[i..].iter().take(end.len()).collect::<String>().eq(&end) {
                i += 1;
            }
            i += end.len();
        } else if at(i) == '"' {
            i += 1;
            while i < chars.len() && at(i) != '"' {
                i += if at(i) == '\\' { 2 } else { 1 };
            }
            i += 1;
        } else if at(i) == '\'' && (at(i + 1) == '\\' || at(i + 2) == '\'') {
            // A char, not a lifetime.
            i += if at(i + 1) == '\\' { 3 } else { 2 };
            while i < chars.len() && at(i) != '\'' {
                i += 1;
            }
            i += 1;
        } else {
            out.push(at(i));
            i += 1;
            continue;
        }
        keep_lines(&mut out, start, i);
    }
    out
}

/// Blanks out `#[cfg(test)] mod … { … }`: a test may look at a clock.
fn without_tests(code: &str) -> String {
    let mut code = code.to_owned();
    while let Some(start) = code.find("#[cfg(test)]") {
        let Some(open) = code[start..].find('{').map(|i| start + i) else {
            break;
        };
        // `#[cfg(test)] mod tests;` and the like end before any brace.
        let semicolon = code[start..].find(';').map_or(usize::MAX, |i| start + i);
        let mut end = open;
        if semicolon < open {
            end = semicolon + 1;
        } else {
            let mut depth = 0;
            for (i, c) in code[open..].char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    _ => {}
                }
                if depth == 0 {
                    end = open + i + 1;
                    break;
                }
            }
        }
        let blank: String = code[start..end]
            .chars()
            .map(|c| if c == '\n' { '\n' } else { ' ' })
            .collect();
        code.replace_range(start..end, &blank);
    }
    code
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Every place where `word` stands by itself (no letter on either side of it).
fn places<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word).map(|(at, _)| at).filter(move |at| {
        let before = code[..*at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        let opens = word.starts_with(is_word) && before.is_some_and(is_word);
        let goes_on = word.ends_with(is_word) && after.is_some_and(is_word);
        !opens && !goes_on
    })
}

/// The first names after `prefix::`, those of a `{…}` group included, with where they stand.
fn names_after(code: &str, prefix: &str) -> Vec<(String, usize)> {
    let mut names = Vec::new();
    for at in places(code, prefix) {
        let rest = &code[at + prefix.len()..];
        if code[..at].ends_with("::") || code[..at].ends_with('$') {
            continue;
        }
        let word = |text: &str| {
            text.trim_start()
                .chars()
                .take_while(|c| is_word(*c))
                .collect::<String>()
        };
        if !rest.starts_with('{') {
            names.push((word(rest), at));
            continue;
        }
        let (mut depth, mut fresh) = (0, false);
        for (i, c) in rest.char_indices() {
            match c {
                '{' => {
                    depth += 1;
                    fresh = depth == 1;
                    continue;
                }
                '}' => depth -= 1,
                ',' if depth == 1 => {
                    fresh = true;
                    continue;
                }
                _ if fresh && is_word(c) => {
                    names.push((word(&rest[i..]), at));
                    fresh = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    names
}

fn line(code: &str, at: usize) -> usize {
    code[..at].matches('\n').count() + 1
}

/// Names of the crates this package depends on, as they stand in code.
fn dependencies() -> BTreeSet<String> {
    let manifest = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    let section = manifest
        .split("\n[dependencies]\n")
        .nth(1)
        .unwrap()
        .split("\n[")
        .next()
        .unwrap();
    let name = |line: &str| {
        let name: String = line.chars().take_while(|c| is_word(*c) || *c == '-').collect();
        (!name.is_empty()).then(|| name.replace('-', "_"))
    };
    section.lines().filter_map(name).collect()
}

fn assert_none(problems: &str) {
    assert!(problems.is_empty(), "\n{problems}");
}

#[test]
fn every_module_uses_only_what_is_below_it() {
    let row = |module: &str| LAYERS.iter().position(|row| row.contains(&module));
    let mut problems = String::new();
    for source in sources() {
        if source.module == "lib" || source.module == "main" {
            continue;
        }
        let own = row(&source.module);
        assert!(
            own.is_some(),
            "src/{} is in no layer: add it to src/lib.rs and to this test",
            source.module
        );
        let depth = source
            .name
            .trim_end_matches("/mod.rs")
            .trim_end_matches(".rs")
            .split('/')
            .count();
        let from_root = "super::".repeat(depth);
        let used = names_after(&source.code, "crate::")
            .into_iter()
            .chain(names_after(&source.code, &from_root));
        for (used, at) in used {
            if used != source.module && row(&used).is_some_and(|used| Some(used) >= own) {
                let at = line(&source.code, at);
                writeln!(
                    problems,
                    "src/{}:{at}: `{}` must not use `{used}`",
                    source.name, source.module
                )
                .unwrap();
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn decisions_know_no_clock_no_cluster_and_no_io() {
    let dependencies = dependencies();
    assert!(
        dependencies.contains("tokio") && dependencies.contains("k8s_openapi"),
        "{dependencies:?}"
    );
    let mut problems = String::new();
    for source in sources() {
        let allowed = match source.module.as_str() {
            "plan" => PLAN_CRATES,
            "api" => API_CRATES,
            _ => continue,
        };
        for name in dependencies
            .iter()
            .filter(|name| !allowed.contains(&name.as_str()))
        {
            for at in places(&source.code, &format!("{name}::")) {
                if source.code[..at].ends_with("::") {
                    continue;
                }
                let at = line(&source.code, at);
                writeln!(
                    problems,
                    "src/{}:{at}: `{}` must not use the crate `{name}`",
                    source.name, source.module
                )
                .unwrap();
            }
        }
        for word in IMPURE {
            for at in places(&source.code, word) {
                let at = line(&source.code, at);
                writeln!(
                    problems,
                    "src/{}:{at}: `{word}`: pass it in from outside",
                    source.name
                )
                .unwrap();
            }
        }
        for (used, at) in names_after(&source.code, "kube::") {
            if !KUBE_IN_API.contains(&used.as_str()) {
                let at = line(&source.code, at);
                writeln!(
                    problems,
                    "src/{}:{at}: `kube::{used}` is more than the derive",
                    source.name
                )
                .unwrap();
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn every_module_says_what_it_is_for() {
    let mut problems = String::new();
    for source in sources() {
        if !source.raw.starts_with("//! ") {
            writeln!(problems, "src/{} does not open with `//!`", source.name).unwrap();
        }
    }
    assert_none(&problems);
}

#[test]
fn the_table_in_lib_names_every_module() {
    let lib = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    for module in LAYERS.iter().copied().flatten() {
        assert!(
            lib.contains(&format!("[`{module}`]")),
            "src/lib.rs does not tell of {module}"
        );
    }
}

#[test]
fn the_reader_of_sources_sees_what_it_should() {
    let text = "use crate::{api::x, plan::{a, b}};\n// crate::gate\nlet s = \"crate::gate\"; crate::link::f();\n\
                #[cfg(test)]\nmod tests { use crate::controller; }\nlet c = '\"'; let r = r#\"crate::agent\"#;";
    let code = without_tests(&bare(text));
    let names: Vec<String> = names_after(&code, "crate::")
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(names, ["api", "plan", "link"]);
    assert_eq!(code.lines().count(), text.lines().count());
}
