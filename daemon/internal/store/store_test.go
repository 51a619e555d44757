package store_test

import (
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"osbuilder/daemon/internal/store"
	"osbuilder/daemon/internal/store/storetest"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == store.AsMortal {
		os.Exit(store.RestoreUntil(os.Args[2:]))
	}
	goleak.VerifyTestMain(m)
}

func TestSQLite(t *testing.T) {
	storetest.Run(t, func(t *testing.T, dir string) storetest.Store {
		s, err := store.Open(t.Context(), filepath.Join(dir, "osbuilder.db"))
		if err != nil {
			t.Fatal(err)
		}
		return s
	})
}
