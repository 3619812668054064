#!/bin/sh
# Gives numba the code that was compiled when the image was made, then becomes the command. numba reads its cache only
# from a folder that it may write to, so under a read-only root the code has to move to one that is not.
set -eu
if ! { mkdir -p "$NUMBA_CACHE_DIR" && cp -R /opt/tenuto/numba/. "$NUMBA_CACHE_DIR"; } 2>/dev/null; then
    echo "tenuto-start: cannot write to $NUMBA_CACHE_DIR; the DNC is compiled anew at every start" >&2
fi
exec "$@"
