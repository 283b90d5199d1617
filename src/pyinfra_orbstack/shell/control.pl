# What `orb_exchange` of session.sh does, in perl: the same frames and the same messages, with one
# new process for each command instead of five.
#
# It uses no modules, since a small system may lack them.

my ($mode, $program) = @ARGV;

# The number of the system call setsid, by this program's own machine code: x86-64 and arm64.
open my $self, '<', '/proc/self/exe';
sysread $self, my $head, 20;
close $self;
my ($class, $machine) = unpack 'x4 C x13 v', $head;
my $setsid = $class == 2 && { 62 => 112, 183 => 157 }->{$machine};

$0 = 'pyinfra-orbstack';
my $pipe = $SIG{PIPE} || 'DEFAULT';
$SIG{PIPE} = 'IGNORE';
$SIG{CHLD} = 'DEFAULT';
# perl marks all of these close-on-exec.
open my $nothing, '<', '/dev/null' or exit 1;
# If perl's settings keep it from reading bytes, it has failed before this line.
exit 42 if $mode eq 'check';
open my $client_out, '>&=', 6 or exit 1;
open my $client_err, '>&=', 7 or exit 1;
my $received = '';

sub interrupted { return $! + 0 == 4 }

sub receive {
    my $count = sysread STDIN, $received, 65536, length $received;
    exit 0 if !defined $count ? !interrupted() : !$count;
}

# False if the client is gone.
sub answer {
    my ($to, $text) = @_;
    while (length $text) {
        my $count = syswrite $to, $text;
        return 0 if !defined $count && !interrupted();
        substr $text, 0, $count || 0, '';
    }
    return 1;
}

# The words of a frame, once all of it is here, read as a shell reads them.
sub frame {
    while (1) {
        my @words = ('');
        if ($received =~ /; \}\n\z/ && $received =~ /\A\{ orb_exchange /gc) {
            while (1) {
                if ($received =~ /\G(?:'([^']*)'|"(')"|([^\s'";]+))/gc) { $words[-1] .= $+ }
                elsif ($received =~ /\G /gc) { push @words, '' }
                else { last }
            }
            if ($received =~ /\G; \}\n\z/gc) {
                $received = '';
                return @words;
            }
        }
        receive();
    }
}

sub line {
    receive() while $received !~ s/\A([^\n]*)\n//;
    return $1;
}

sub become {
    my ($in, $out, $err, @words) = @_;
    unshift @words, $program if $program && !($setsid && eval { $$ == syscall $setsid });
    # If these fail, the command must not run: it would read this program's input.
    if (!(open(STDIN, '<&', $in) && open(STDOUT, '>&', $out) && open STDERR, '>&', $err)) {
        syswrite $err, "$words[0]: $!\n";
        exit 126;
    }
    $SIG{PIPE} = $pipe;
    exec @words;
    syswrite STDERR, "$words[0]: $!\n";
    exit 126;
}

sub process {
    my ($pid) = @_;
    open my $stat, '<', "/proc/$pid/stat" or return '';
    sysread $stat, my $text, 4096;
    # A name may contain newlines.
    $text =~ tr/\n/ /;
    return $text;
}

# Copies both outputs until they are closed, writes the input, and reports how the command ended.
# Output waits up to 5 ms for more, since each message wakes the client.
sub follow {
    my ($token, $pid, $in, $input, @streams) = @_;
    my ($begun, $rounds, $left, $report) = (0, 0, $input, '');
    my $send = sub {
        my ($about) = @_;
        for (@streams) {
            my $text = ($begun ? '' : "$token begin $about\n") . $_->{text};
            # Without a reader, the command gets a broken pipe in its turn.
            close $_->{from} if !answer($_->{to}, $text);
            $_->{text} = '';
        }
        ($begun, $rounds) = (1, 0);
    };
    while (1) {
        my @open = grep { defined fileno $_->{from} } @streams;
        last if !@open && !$in;
        my ($readable, $writable) = ('', '');
        vec($readable, fileno $_->{from}, 1) = 1 for @open;
        vec($writable, fileno $in, 1) = 1 if $in;
        my $holds = !$begun || grep { length $_->{text} } @streams;
        my $ready = select $readable, $writable, undef, $holds ? 0.005 : undef;
        next if $ready < 0;
        if ($in && vec $writable, fileno $in, 1) {
            # A pipe that is ready takes as much as this.
            my $count = syswrite $in, $left, 4096;
            substr $left, 0, $count || 0, '';
            # A command need not read it all; a shell would then report SIGPIPE.
            my $broken = !defined $count && !interrupted();
            if ($broken || !length $left) {
                close $in;
                undef $in;
                $report = "$token input " . ($broken ? 141 : 0) . "\n";
            }
        }
        for (grep { vec $readable, fileno $_->{from}, 1 } @open) {
            my $count = sysread $_->{from}, $_->{text}, 65536, length $_->{text};
            close $_->{from} if !defined $count ? !interrupted() : !$count;
        }
        my $much = grep { length $_->{text} >= 32768 } @streams;
        $send->(process($pid)) if $holds && ($ready == 0 || $much || ++$rounds > 8);
    }
    # A process can be reaped a moment after its outputs are closed, unless it goes on without them.
    my $waits = 20;
    until (waitpid $pid, 1) {
        select undef, undef, undef, 0.00025;
        next if $waits--;
        $send->(process($pid)) if !$begun || grep { length $_->{text} } @streams;
        waitpid $pid, 0;
        last;
    }
    my $status = $? & 127 ? 128 + ($? & 127) : $? >> 8;
    $streams[0]{text} .= $report;
    $_->{text} .= "$token status $status\n$token copied 0\n$token end\n" for @streams;
    $send->('');
}

while (1) {
    my ($token, $start, $source, @words) = frame();
    if (length $start) {
        answer($client_out, "$token ready\n");
        exit 1 if line() ne $start;
    }
    # Input that follows START, of a given length.
    my $behind = $source =~ /\A-(\d+)\z/ ? $1 : 0;
    receive() while length $received < $behind;
    pipe my $out, my $out_end or exit 1;
    pipe my $err, my $err_end or exit 1;
    my ($in_end, $in);
    # `pipe` would close a handle that it is given.
    if ($source eq '-none') { $in_end = $nothing }
    else { pipe $in_end, $in or exit 1 }
    my $pid = fork;
    exit 1 if !defined $pid;
    become($in_end, $out_end, $err_end, @words) if !$pid;
    close $_ for $out_end, $err_end;
    close $in_end if $in;
    if ($behind) { $source = substr $received, 0, $behind, '' }
    elsif ($in) { $source =~ s/\\([0-7]{3})/chr oct $1/ge }
    follow($token, $pid, $in, $source,
        { from => $out, to => $client_out, text => '' },
        { from => $err, to => $client_err, text => '' });
}
