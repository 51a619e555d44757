# Who is who: root runs the runner, builder is who comes in by SSH, job-N is who runs the job in slot N.
# "*" is a password that nothing matches; "!" would be a locked account, which sshd without PAM refuses even with a key.
{ lib, ... }:
let
  slots = lib.range 1 8;
  job = n: {
    name = "job-${toString n}";
    value = {
      isSystemUser = true;
      uid = 1000 + n;
      group = "jobs";
      hashedPassword = "*";
    };
  };
in
{
  users = {
    mutableUsers = false;
    # Keys come at boot.
    allowNoPasswordLogin = true;
    groups = {
      builder.gid = 1000;
      jobs.gid = 1100;
    };
    users = lib.listToAttrs (map job slots) // {
      root.hashedPassword = "*";
      builder = {
        isNormalUser = true;
        uid = 1000;
        group = "builder";
        createHome = false;
        hashedPassword = "*";
      };
    };
  };
  # The home and what a shell reads there belong to root: a request comes in as builder and must not be able to change what
  # the next session does.
  systemd.tmpfiles.rules = [
    "d /home/builder 0755 root root -"
    "f /home/builder/.bashrc 0644 root root -"
    "f /home/builder/.profile 0644 root root -"
  ];
  # Builds may watch many files.
  boot.kernel.sysctl."fs.inotify.max_user_instances" = lib.mkForce 1024;
}
