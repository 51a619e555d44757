# What an image of version v holds: a system, parts that every version shares,
# and one of its own. The files are Debian's, so that there are many and of many
# sizes.
{ v }:
let
  make =
    name: text:
    derivation {
      inherit name;
      system = builtins.currentSystem;
      builder = "/bin/bash";
      # The last word is Bash's own. As its last command Bash runs a program in its
      # own place, and those of coreutils close their output before they end: at
      # that moment Nix kills the builder.
      args = [
        "-ec"
        "${text}\nexit 0"
      ];
      PATH = "/usr/bin";
    };
  parts = builtins.genList (
    n:
    make "part-${toString n}" ''
      mkdir $out
      ls -d /usr/lib/x86_64-linux-gnu/lib[a-l]* /usr/share/perl/*/[A-I]* /usr/bin/[a-b]* | sed -n '${toString (n + 1)}~20p' |
        xargs cp -rPt $out
    ''
  ) 20;
in
rec {
  own = make "own-${v}" "mkdir $out; head -c 3000000 /dev/urandom >$out/data; echo ${v} >$out/version";
  system = make "nixos-system-${v}" "mkdir $out; ln -s ${own} $out/own; echo ${toString parts} >$out/parts";
  # Not in the image: built in a VM of that version.
  job = make "job" "mkdir $out; cp ${own}/data $out; ln -s ${own} $out/own";
}
