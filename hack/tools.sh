# shellcheck shell=bash
# What hack/demo, hack/test and hack/bench need of the machine. Sourced, not run.

# Debian keeps ip, nft and conntrack where an ordinary user's PATH does not look.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
# A Go that was unpacked where its own instructions say.
[[ -x /usr/local/go/bin/go ]] && PATH=$PATH:/usr/local/go/bin
# A Rust that rustup just installed, before the next login.
[[ -d ${CARGO_HOME:-$HOME/.cargo}/bin ]] && PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin

CARGO=${CARGO:-cargo}
TARGET=${CARGO_TARGET_DIR:-target}

# One line about what goes on, to a person or to a log.
say() { printf '%s\n' "$*" >&2; }

# Debian's package for each program that is used here.
declare -A debian=(
    [ip]=iproute2 [nft]=nftables [conntrack]=conntrack [unshare]=util-linux [setpriv]=util-linux [cc]=gcc
)

# Ends with a message unless everything is here. What Debian has is installed where that needs no password.
need_tools() {
    local program packages=() missing=() root=()
    for program in "${!debian[@]}"; do
        command -v "$program" >/dev/null && continue
        missing+=("$program")
        [[ " ${packages[*]-} " == *" ${debian[$program]} "* ]] || packages+=("${debian[$program]}")
        # A C compiler is no use without its library's headers.
        [[ $program == cc ]] && packages+=(libc6-dev)
    done
    if [[ ${#missing[@]} -gt 0 ]]; then
        local install="apt-get install -y --no-install-recommends ${packages[*]}"
        [[ $(id -u) -eq 0 ]] || root=(sudo -n)
        if command -v apt-get >/dev/null && { [[ $(id -u) -eq 0 ]] || sudo -n true 2>/dev/null; }; then
            say "Missing: ${missing[*]}. Installing with: $install"
            # A list from last month may name packages that are gone; one that cannot be renewed may still do.
            "${root[@]}" apt-get update -qq >&2 || say "apt-get update failed; trying without it"
            # shellcheck disable=SC2086
            DEBIAN_FRONTEND=noninteractive "${root[@]}" $install >&2 </dev/null || {
                say "That did not work. Install by hand, then run this again: ${packages[*]}"
                exit 1
            }
        else
            say "Missing: ${missing[*]}"
            say "On Debian: sudo apt-get update && sudo $install"
            exit 1
        fi
    fi
    if ! command -v "$CARGO" >/dev/null; then
        say "Missing: cargo. Install Rust as https://rustup.rs says:"
        say "  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal"
        exit 1
    fi
}
