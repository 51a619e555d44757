# shellcheck shell=sh
# resolve-in-root ROOT PATH: PATH with every link resolved as if ROOT were /.
# Stands in for NixOS's own program, which is written in Rust.
root=$1 rest=$2 out=
while [ -n "$rest" ]; do
  rest=${rest#/}
  name=${rest%%/*}
  if [ "$name" = "$rest" ]; then rest=; else rest=${rest#*/}; fi
  case $name in
    '' | .) continue ;;
    ..)
      out=${out%/*}
      continue
      ;;
  esac
  if [ -L "$root$out/$name" ]; then
    target=$(readlink "$root$out/$name")
    rest=$target${rest:+/$rest}
    case $target in /*) out= ;; esac
  else
    out=$out/$name
  fi
done
echo "$out"
