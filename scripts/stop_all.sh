#!/bin/sh
# Stops what start_macos.sh has started, and nothing else:
#     scripts/stop_all.sh [CONFIG.json] [IDS]
# Without CONFIG.json: what runs of two_hosts_config.json.
set -eu
unset CDPATH
scripts=$(cd -- "$(dirname -- "$0")" && pwd)

case ${1-} in
    *.json) config=$1; shift ;;
    *) config=$scripts/../two_hosts_config.json ;;
esac

# macOS has an old python3 of its own; a newer one may be there under its full name.
for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        exec "$python" "$scripts/run.py" stop "$config" "$@"
    fi
done
echo "Python 3.10 or later is needed and was not found; install it from python.org" >&2
exit 2
