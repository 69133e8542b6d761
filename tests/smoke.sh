#!/bin/sh
# One end-to-end run as a user would do it: train, stop, resume, evaluate, report, and bad input.
set -eu
BIN=$(cd "$1" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
cd "$WORK"

refused() { # expected exit code, then a command: one line on stderr, no traceback
  expected=$1
  shift
  code=0
  "$@" >out.txt 2>err.txt || code=$?
  if [ "$code" != "$expected" ] || [ "$(wc -l <err.txt)" != 1 ] || grep -q Traceback err.txt; then
    echo "smoke: exit $code (expected $expected) from: $*"
    cat err.txt
    exit 1
  fi
}

"$BIN/redefense" data check digits
"$BIN/redefense" train digits-red --set epochs=1 --set batch_size=128 --out runs/red --quiet
"$BIN/redefense" train digits-vanilla --set epochs=2 --out runs/vanilla --quiet
"$BIN/redefense" train digits-vanilla --set epochs=2 --out runs/vanilla --resume --quiet
"$BIN/redefense" evaluate runs/red --images 50 --quiet
"$BIN/redefense" evaluate runs/vanilla --images 50 --quiet
"$BIN/redefense" report runs/red runs/vanilla --out report.html
test -s report.html && test -s report.md && test -s report.csv

# what else is refused, and every list, is asked for in tests/commands, in one process
refused 2 "$BIN/redefense" train digits-rde
refused 3 "$BIN/redefense" train cifar10-mini-red --data cifar10:nowhere --out runs/none
test ! -e runs/none
echo "smoke: passed"
