//! `$(NAME)` references in a container's env, command and args.

/// Replaces `$(NAME)` by what `lookup` answers, as the kubelet does: `$$` is a
/// literal `$`, and a reference to nothing stays as it is written.
pub fn expand<'v>(input: &str, lookup: impl Fn(&str) -> Option<&'v str>) -> String {
    let mut out = String::with_capacity(input.len());
    let mut rest = input;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match lookup(name) {
                Some(value) => out.push_str(value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = tail;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(name: &str) -> Option<&'static str> {
        match name {
            "A" => Some("1"),
            "B" => Some("$(A)"),
            "EMPTY" => Some(""),
            _ => None,
        }
    }

    #[test]
    fn the_kubelets_own_cases() {
        for (input, expected) in [
            ("$(A)", "1"),
            ("$(A)-$(A)", "1-1"),
            ("___$(B)___", "___$(A)___"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$$$$(A)", "$$(A)"),
            ("$(MISSING)", "$(MISSING)"),
            ("$(EMPTY)x", "x"),
            ("$(A", "$(A"),
            ("$A", "$A"),
            ("foo$", "foo$"),
            ("$()", "$()"),
            ("$($(A))", "$($(A))"),
            ("$(A)$é", "1$é"),
            ("\n$(A)", "\n1"),
        ] {
            assert_eq!(expand(input, sample), expected, "{input}");
        }
    }

    proptest! {
        #[test]
        fn text_without_a_dollar_is_left_alone(input in "[^$]*") {
            prop_assert_eq!(expand(&input, sample), input);
        }

        #[test]
        fn doubling_every_dollar_protects_any_text(input in ".*") {
            prop_assert_eq!(expand(&input.replace('$', "$$"), sample), input);
        }

        #[test]
        fn unknown_names_change_only_escapes(input in "[a-z$()]*") {
            // With nothing defined only `$$` may shrink, so that one escape pass more gives the same.
            let once = expand(&input, |_| None);
            prop_assert_eq!(once.replace('$', ""), input.replace('$', ""));
        }

        #[test]
        fn a_reference_is_its_value(before in "[^$]*", value in ".*", after in "[^$]*") {
            let input = format!("{before}$(X){after}");
            let got = expand(&input, |name| (name == "X").then_some(value.as_str()));
            prop_assert_eq!(got, format!("{before}{value}{after}"));
        }
    }
}
