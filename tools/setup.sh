# Sourced by demo/run, tests/run and benchmarks/run, which have changed to the top of the checkout. POSIX sh only: dash,
# busybox, macOS.

# Sets $python to the newest Python that is new enough, or ends the script with the list of what was found.
find_python() {
    python=
    seen=
    for name in python3.14 python3.13 python3.12 python3.11 python3.10 python3; do
        file=$(command -v "$name" 2>/dev/null) || continue
        # Run, not only found: version managers put names on PATH that answer with an error.
        # The condition comes before the import of anything new, in words that Python 2 understands too.
        if answer=$("$file" -E -c '
import sys
print("%d.%d.%d" % tuple(sys.version_info[:3]))
sys.exit(sys.version_info < (3, 10) or "PyPy" in sys.version)
' 2>/dev/null </dev/null); then
            python=$file
            return 0
        fi
        case $answer in
            '') seen="$seen
  $file does not run" ;;
            *) seen="$seen
  $file is Python $answer" ;;
        esac
    done
    cat >&2 <<END
$0: Python 3.10 or newer is needed, and none was found on PATH.
Looked for python3.14 … python3.10 and python3; found:${seen:-
  nothing}
Install one (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python) and run this again.
END
    exit 1
}
