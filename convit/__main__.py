import sys

from convit.cli import main

sys.exit(main())
