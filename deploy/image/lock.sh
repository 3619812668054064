#!/bin/sh
# Writes the locks that the Dockerfile installs from, with the hash of every file that pip may take. `make lock` calls it
# in the root folder, with uv and the index of torch's CPU build as arguments. An empty index means that this build is
# among pip's own find-links.
set -eu
uv=$1 torch_index=$2
torch=$(grep '^torch==' constraints.txt)
# compile OUTPUT ARGUMENT...
compile() {
    output=$1
    shift
    echo "locking $output"
    "$uv" pip compile --quiet --upgrade --generate-hashes --only-binary :all: --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --index-strategy unsafe-best-match \
        --custom-compile-command "make lock" --output-file "$output" "$@"
}

for variant in cpu gpu; do
    # PyPI has the GPU build. The other one is told from it by its version.
    exact=$torch
    set --
    unset UV_FIND_LINKS
    if [ "$variant" = cpu ]; then
        exact=$torch+cpu
        if [ -n "$torch_index" ]; then
            set -- --extra-index-url "$torch_index"
        else
            UV_FIND_LINKS=$(python3 -m pip config get global.find-links | xargs | tr ' ' ,)
            export UV_FIND_LINKS
        fi
    fi
    # The server's is a part of the trainer's: the images share a layer, and both run the same versions.
    trainer=deploy/image/trainer-$variant.lock
    echo "$exact" | compile "$trainer" pyproject.toml - --extra server --extra trainer -c constraints.txt "$@"
    echo "$exact" | compile "deploy/image/server-$variant.lock" pyproject.toml - --extra server -c "$trainer" "$@"
done
echo hatchling | compile deploy/image/build.lock -
