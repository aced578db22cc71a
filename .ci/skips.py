"""List the skipped tests of a junit file; exit 1 unless the CPU lacked what a test needs."""

import sys
from xml.etree import ElementTree

ALLOWED = "this CPU lacks"

wrong = 0
for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
    for skip in case.iter("skipped"):
        if skip.get("type") == "pytest.xfail":  # it ran, and failed as the test says
            continue
        reason = skip.get("message") or ""
        allowed = reason.startswith(ALLOWED)
        wrong += not allowed
        print(
            "skipped" if allowed else "NOT ALLOWED", case.get("classname"), case.get("name"), reason
        )
if wrong:
    sys.exit(f"{wrong} tests skipped; a reason that CI allows starts with {ALLOWED!r}")
