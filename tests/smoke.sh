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
for run in red vanilla; do
  "$BIN/redefense" evaluate "runs/$run" --images 50 --quiet
done
"$BIN/redefense" report runs/red runs/vanilla --out report.html
test -s report.html && test -s report.md && test -s report.csv
for kind in attacks defences models data recipes suites; do
  "$BIN/redefense" list "$kind" --json >list.json
  test -s list.json
done

refused 2 "$BIN/redefense" train digits-rde
refused 2 "$BIN/redefense" train digits-red --set epoch=3
refused 2 "$BIN/redefense" train digits-red --set epochs=three
refused 2 "$BIN/redefense" train digits-red --set defence.similarty=3
refused 3 "$BIN/redefense" train cifar10-mini-red --data cifar10:nowhere --out runs/none
refused 2 "$BIN/redefense" train digits-vanilla --out runs/vanilla
refused 2 "$BIN/redefense" evaluate runs/red --images 60
refused 3 "$BIN/redefense" evaluate runs/none
test ! -e runs/none
echo "smoke: passed"
