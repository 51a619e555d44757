# The serial console tells; nobody can type anything into it that matters.
{
  lib,
  options,
  pkgs,
  ...
}:
let
  serial = if pkgs.stdenv.hostPlatform.isAarch64 then "ttyAMA0" else "ttyS0";
in
{
  boot.kernelParams = [
    "console=tty0"
    "console=${serial},115200n8" # the last one is /dev/console
    "panic=10"
    # A stage 1 that fails ends in a restart, not in a question. Both kinds of stage 1 know this one; it goes before
    # boot.shell_on_fail, which the ISO module sets for the older kind.
    "boot.panic_on_fail"
  ]
  # On an emulated machine the timer's ticks may come late, which the kernel takes for a fault: it panics.
  ++ lib.optional pkgs.stdenv.hostPlatform.isx86 "no_timer_check";
  boot.initrd.systemd = {
    # The ISO module opens a root shell if stage 1 fails.
    emergencyAccess = lib.mkForce false;
    # In place of sulogin. It must be there: emergency.target, which sets off the panic, requires it.
    services.emergency.serviceConfig = {
      ExecStart = [
        ""
        "/bin/echo osbuilder: stage 1 of the boot failed: starting again"
      ];
      StandardInput = "null";
      StandardOutput = "tty";
    };
    suppressedUnits = [
      "rescue.service"
      "rescue.target"
      "systemd-ask-password-console.service"
      "systemd-ask-password-console.path"
    ];
  };
  systemd.enableEmergencyMode = false;
  systemd.suppressedSystemUnits = [
    "rescue.service"
    "rescue.target"
    "debug-shell.service"
    "systemd-ask-password-console.service"
    "systemd-ask-password-console.path"
    "systemd-ask-password-wall.service"
    "systemd-ask-password-wall.path"
  ];

  # No login. autovt@ is an alias of getty@, and getty.target wants it for tty1.
  systemd.targets.getty.enable = false;
  systemd.services = {
    "getty@".enable = false;
    "serial-getty@".enable = false;
    "container-getty@".enable = false;
    "autovt@".enable = false;
    console-getty.enable = false;
  };
  # These would add a login, or a way in that is not the one of ssh.nix.
  systemd.generators = {
    systemd-getty-generator = "/dev/null";
    systemd-ssh-generator = "/dev/null";
  };
  services.logind =
    if options.services.logind ? settings then
      {
        settings.Login = {
          NAutoVTs = 0;
          ReserveVT = 0;
        };
      }
    else
      {
        extraConfig = ''
          NAutoVTs=0
          ReserveVT=0
        '';
      };

  # The log lives in memory; what is an error is also on the console, where a VM out of reach can still be read.
  services.journald = lib.mkMerge [
    {
      extraConfig = ''
        RuntimeMaxUse=64M
        Audit=no
        ForwardToConsole=yes
        MaxLevelConsole=err
      '';
    }
    (
      # A text of its own before 24.05.
      if options.services.journald ? storage then
        { storage = "volatile"; }
      else
        { extraConfig = "Storage=volatile"; }
    )
  ];
}
