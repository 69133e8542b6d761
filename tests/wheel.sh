#!/bin/sh
# The wheel as a user gets it: built from the sdist, installed where the clone cannot be seen.
set -eu
BIN=$(cd "$1" && pwd)
CLONE=$(pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
unset PYTHONPATH

"$BIN/python" -m build --no-isolation --outdir "$WORK/dist" . >"$WORK/build.txt" 2>&1 || {
  tail -20 "$WORK/build.txt"
  exit 1
}
cd "$WORK"

# everything in the package that git knows is in the wheel
"$BIN/python" -m zipfile -l dist/*.whl | awk '/^redefense\//{print $1}' | sort >inside.txt
(cd "$CLONE/src" && git ls-files redefense) | sort >known.txt
if comm -13 inside.txt known.txt | grep .; then
  echo "wheel: the files above are missing: name their kind under package-data in pyproject.toml"
  exit 1
fi

# the packages that redefense needs are those of the clone's environment, but not redefense itself
"$BIN/python" -m venv --without-pip env
site=$(env/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
"$BIN/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" >"$site/needed.pth"
"$BIN/python" -m pip --python env/bin/python install --quiet --disable-pip-version-check --no-deps \
  --no-index dist/*.whl

env/bin/python - "$WORK" <<'EOF'
import sys
from importlib.metadata import requires, version
from importlib.resources import files

from packaging.requirements import Requirement

import redefense

assert redefense.__file__.startswith(sys.argv[1]), redefense.__file__
assert redefense.__version__ == version("redefense")
assert files("redefense").joinpath("py.typed").is_file()
for requirement in map(Requirement, requires("redefense")):
    if requirement.marker is None or requirement.marker.evaluate({"extra": "serve"}):
        assert requirement.specifier.contains(version(requirement.name)), requirement
print("wheel:", redefense.__version__)
EOF
env/bin/redefense train digits-red --set epochs=1 --set batch_size=128 --out runs/red --quiet
env/bin/redefense evaluate runs/red --images 10 --quiet
env/bin/redefense report runs/red --out report.html --quiet
env/bin/redefense export runs/red --out bundle --quiet
env/bin/redefense serve bundle --port 0 2>log.txt &
server=$!
url=$(timeout 30 sh -c 'until grep -o "http://[0-9.:]*" log.txt; do sleep 0.1; done')
"$BIN/python" - "$url" <<'EOF'
import sys
from urllib.request import urlopen

assert urlopen(sys.argv[1] + "/v2/health/ready").status == 200
assert b"<html" in urlopen(sys.argv[1] + "/").read()
EOF
kill "$server"
wait "$server"
echo "wheel: passed"
