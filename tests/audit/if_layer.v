// One layer of integrate-and-fire neurons in whole numbers, as hardware
// would have it. Behavioural, for Icarus Verilog (verilog.py writes the memory files and reads
// what comes out). An input that spikes adds its weights to the potentials of the neurons that
// it reaches. Sums wrap in two's complement, so the order of the additions does not matter: a
// register that holds the potential after a step is wide enough, whatever the partial sums are.
module if_layer;
    parameter INPUTS = 1, NEURONS = 1, CONNECTIONS = 1, TRAINS = 1;
    parameter BITS = 32;   // of a potential register
    parameter STEPS = 1;   // T: input and bias come at steps 1 to T
    parameter DELAY = 0;   // d: the layer may fire at steps d + 1 to d + T
    parameter FIRES = 1;   // 0: the last layer, which only sums up

    reg [0:INPUTS-1] spikes [0:TRAINS*STEPS-1];  // one row a step, train by train
    // connections of input i: first[i] to first[i+1] - 1
    reg [31:0] first [0:INPUTS], target [0:CONNECTIONS-1];
    reg signed [31:0] weight [0:CONNECTIONS-1];
    reg signed [31:0] bias [0:NEURONS-1], theta [0:NEURONS-1], v0 [0:NEURONS-1];

    reg signed [BITS-1:0] v [0:NEURONS-1];
    reg [0:INPUTS-1] arriving;
    reg [0:NEURONS-1] fired;
    integer train, t, i, c, n, spikes_file, potentials_file;

    task read_memories;
        begin
            $readmemh("spikes.hex", spikes);
            $readmemh("first.hex", first);
            $readmemh("target.hex", target);
            $readmemh("weight.hex", weight);
            $readmemh("bias.hex", bias);
            $readmemh("theta.hex", theta);
            $readmemh("v0.hex", v0);
        end
    endtask

    task integrate;
        begin
            arriving = spikes[train * STEPS + t - 1];
            for (i = 0; i < INPUTS; i = i + 1)
                if (arriving[i])
                    for (c = first[i]; c < first[i + 1]; c = c + 1)
                        v[target[c]] = v[target[c]] + weight[c];
            for (n = 0; n < NEURONS; n = n + 1) v[n] = v[n] + bias[n];
        end
    endtask

    task fire;  // at ">=", by subtraction: the residue carries the rest of the charge
        begin
            for (n = 0; n < NEURONS; n = n + 1) begin
                fired[n] = v[n] >= theta[n];
                if (fired[n]) v[n] = v[n] - theta[n];
            end
            $fdisplay(spikes_file, "%b", fired);
        end
    endtask

    task write_potentials;
        for (n = 0; n < NEURONS; n = n + 1) $fdisplay(potentials_file, "%0d", v[n]);
    endtask

    initial begin
        read_memories;
        spikes_file = $fopen("spikes.txt", "w");
        potentials_file = $fopen("potentials.txt", "w");
        for (train = 0; train < TRAINS; train = train + 1) begin
            for (n = 0; n < NEURONS; n = n + 1) v[n] = v0[n];
            for (t = 1; t <= STEPS + DELAY; t = t + 1) begin
                if (t <= STEPS) integrate;
                if (FIRES && t > DELAY) fire;
                if (!FIRES || t == STEPS + DELAY) write_potentials;
            end
        end
        $fclose(spikes_file);
        $fclose(potentials_file);
    end
endmodule
