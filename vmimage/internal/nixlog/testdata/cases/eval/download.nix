{ value = import (builtins.fetchTarball "https://example.invalid/x.tar.gz"); }
