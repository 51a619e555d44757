package product_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"osbuilder/vmimage/internal/product"
)

// tree makes files under a new folder; OUT in them is the folder itself, and a
// name that ends in @ is a link to what it holds.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	out, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		text = strings.ReplaceAll(text, "OUT", out)
		path := filepath.Join(out, strings.TrimSuffix(name, "@"))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "@") {
			err = os.Symlink(text, path)
		} else {
			err = os.WriteFile(path, []byte(text), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func TestFind(t *testing.T) {
	for _, test := range []struct {
		name     string
		files    map[string]string
		filePath string
		want     []string // below the output
	}{
		{"as the build says", map[string]string{
			"iso/nixos.iso": "", "iso/other.iso": "", "nix-support/system": "x",
			"nix-support/hydra-build-products": "file iso OUT/iso/nixos.iso\n",
		}, "iso/other.iso", []string{"iso/nixos.iso"}},
		{"several, with blanks in a name", map[string]string{
			"a b.img": "", "c.img": "", "doc.html": "",
			"nix-support/hydra-build-products": "doc manual OUT/doc.html\nfile img \"OUT/a b.img\"\n  file img OUT/c.img x\nfile img OUT/c.img\n\nfile\n",
		}, "", []string{"a b.img", "c.img"}},
		{"said, but not there", map[string]string{
			"iso/nixos.iso": "", "x": "",
			"nix-support/hydra-build-products": "file iso OUT/gone.iso\nfile iso OUT/iso\n",
		}, "iso/nixos.iso", []string{"iso/nixos.iso"}},
		{"by its path", map[string]string{"a.img": "", "b.img": ""}, "b.img", []string{"b.img"}},
		{"the only file", map[string]string{"sub/a.img": "", "nix-support/x": ""}, "gone.img", []string{"sub/a.img"}},
		{"a link", map[string]string{"real/a.img": "", "nix-support/hydra-build-products": "file img OUT/b.img", "b.img@": "OUT/real/a.img"}, "", []string{"real/a.img"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			out := tree(t, test.files)
			got, err := product.Find(out, test.filePath)
			if err != nil {
				t.Fatal(err)
			}
			for i := range got {
				got[i], _ = filepath.Rel(out, got[i])
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

func TestFindOfAFile(t *testing.T) {
	out := filepath.Join(tree(t, map[string]string{"vm.ova": ""}), "vm.ova")
	got, err := product.Find(out, "")
	if diff := cmp.Diff([]string{out}, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got)\n%s", err, diff)
	}
}

func TestFindRefusesToGuess(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"holds no file":       {"nix-support/x": ""},
		"holds several files": {"a": "", "b": ""},
		"no such file":        nil,
	} {
		out := tree(t, files)
		if files == nil {
			out += "/gone"
		}
		if got, err := product.Find(out, ""); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("want an error %q, got %v, %v", name, got, err)
		}
	}
}
