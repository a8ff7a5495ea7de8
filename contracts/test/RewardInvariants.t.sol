// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IRewardDistributor} from "../src/interfaces/IRewardDistributor.sol";
import {RewardsBase} from "./Base.sol";
import {RewardTree} from "./RewardTree.sol";
import {VM} from "./Vm.sol";

/// @dev Everybody who may do anything, in any order and with values that often fit. It is the whole world of a run.
contract RewardWorld is RewardsBase {
    uint256 public deposited;
    uint256 public accepted;
    uint256 public claims;
    uint256 public start;
    bool public settledBackwards;
    bool public claimedBackwards;
    bool public paidWrongly;

    address[3] private accounts = [person("account 0"), person("account 1"), person("account 2")];
    uint256[3] private proposedAmounts;
    uint256[3] private amounts; // of the root in force
    bytes32 private proposedRoot;
    uint256 private proposedTotal;
    IRewardDistributor.Allocation[] private proposed;

    constructor() {
        arrange();
        deposited = 2 * DEPOSIT;
        start = block.timestamp;
    }

    function deposit(bool toA, uint256 amount) external {
        amount = bound(amount, 3000);
        fund(toA ? logA : logB, amount);
        deposited += amount;
    }

    function grow(bool ofA, uint64 by) external {
        bytes32 logId = ofA ? logA : logB;
        (uint64 size,,) = log.headOf(logId);
        anchor(log, logId, size + 1 + uint64(bound(by, 50)));
    }

    /// @dev Amounts of the accounts are any: a dishonest root too.
    function proposeNext(uint256[2] calldata sums, uint64[2] calldata lengths, uint256[3] calldata earned) external {
        (uint256 total,,) = rewards.totals();
        IRewardDistributor.Allocation[] memory allocations = new IRewardDistributor.Allocation[](2);
        for (uint256 i = 0; i < 2; ++i) {
            bytes32 logId = i == 0 ? logA : logB;
            uint64 from = rewards.settledSizeOf(logId);
            allocations[i] = allocation(logId, from, from + 1 + uint64(bound(lengths[i], 60)), bound(sums[i], 600));
            total += allocations[i].amount;
        }
        bytes32[] memory leaves = new bytes32[](3);
        uint256[3] memory next;
        for (uint256 i = 0; i < 3; ++i) {
            next[i] = 1 + amounts[i] * (bound(earned[i], 9) == 0 ? 0 : 1) + bound(earned[i] >> 8, 700);
            leaves[i] = RewardTree.leafOf(address(rewards), accounts[i], next[i]);
        }
        propose(RewardTree.rootOf(leaves), total, allocations);
        (proposedRoot, proposedTotal, proposedAmounts) = (RewardTree.rootOf(leaves), total, next);
        delete proposed;
        for (uint256 i = 0; i < 2; ++i) {
            proposed.push(allocations[i]);
        }
    }

    function accept(uint256 wait, uint256 signers) external {
        skip(bound(wait, 2 * DELAY));
        bytes[] memory signatures = attestations(bound(signers, 3));
        uint64 before = rewards.settledSizeOf(logA);
        rewards.accept(rewards.epoch(), proposedRoot, proposedTotal, proposed, signatures);
        if (rewards.settledSizeOf(logA) <= before || signatures.length < 2) settledBackwards = true;
        amounts = proposedAmounts;
        ++accepted;
    }

    function veto(uint256 which) external {
        if (bound(which, 7) != 0) return; // else hardly an epoch would be accepted
        VM.prank(guardian);
        rewards.veto();
    }

    function pauseAndUnpause(uint256 which) external {
        if (bound(which, 7) == 0) {
            VM.prank(guardian);
            rewards.pause();
        } else {
            VM.prank(admin);
            rewards.unpause();
        }
    }

    function claim(uint256 who, bool honest) external {
        who = bound(who, 2);
        bytes32[] memory leaves = new bytes32[](3);
        for (uint256 i = 0; i < 3; ++i) {
            leaves[i] = RewardTree.leafOf(address(rewards), accounts[i], amounts[i]);
        }
        uint256 had = token.balanceOf(accounts[who]);
        uint256 asked = honest ? amounts[who] : amounts[who] + 1;
        bytes32[] memory proof = RewardTree.proofOf(leaves, who);
        rewards.claim(accounts[who], asked, proof);
        if (!honest || token.balanceOf(accounts[who]) != amounts[who]) paidWrongly = true;
        if (token.balanceOf(accounts[who]) <= had) claimedBackwards = true;
        ++claims;
    }

    function paidOut() external view returns (uint256 sum) {
        for (uint256 i = 0; i < 3; ++i) {
            sum += rewards.claimedOf(accounts[i]);
            assertEq(token.balanceOf(accounts[i]), rewards.claimedOf(accounts[i]));
        }
    }

    function sums() external view returns (uint256 total, uint256 claimed, uint256 unsettled, uint256 held) {
        (total, claimed,) = rewards.totals();
        unsettled = rewards.depositOf(logA) + rewards.depositOf(logB);
        held = token.balanceOf(address(rewards));
    }

    function settledWithinAnchored() external view returns (bool) {
        (uint64 sizeA,,) = log.headOf(logA);
        (uint64 sizeB,,) = log.headOf(logB);
        return rewards.settledSizeOf(logA) <= sizeA && rewards.settledSizeOf(logB) <= sizeB;
    }

    function mostAllowed() external view returns (uint256) {
        return CAP * ((block.timestamp - start) / DELAY);
    }
}

contract RewardInvariants {
    RewardWorld private world;

    function setUp() public {
        world = new RewardWorld();
    }

    /// @dev The world moves: without this, invariants could hold because nothing ever succeeds.
    function test_an_epoch_is_accepted_and_claimed() public {
        world.proposeNext(
            [uint256(500), 400], [uint64(10), 20], [uint256(300) << 8, uint256(200) << 8, uint256(100) << 8]
        );
        world.accept(86400, 2);
        world.claim(0, true);
        world.claim(1, true);
        (uint256 total, uint256 claimed,,) = world.sums();
        require(total == 900 && claimed == 502 && world.accepted() == 1 && world.claims() == 2);
    }

    function targetContracts() public view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(world);
    }

    function invariant_claimed_is_at_most_total_is_at_most_deposits() public view {
        (uint256 total, uint256 claimed,,) = world.sums();
        require(claimed <= total && total <= world.deposited());
    }

    function invariant_every_token_is_accounted_for() public view {
        (uint256 total, uint256 claimed, uint256 unsettled, uint256 held) = world.sums();
        require(held == unsettled + total - claimed);
        require(total + unsettled == world.deposited());
        require(world.paidOut() == claimed);
    }

    function invariant_settled_is_anchored() public view {
        require(world.settledWithinAnchored());
    }

    function invariant_total_is_at_most_one_cap_per_delay() public view {
        (uint256 total,,,) = world.sums();
        require(total <= world.mostAllowed());
    }

    function invariant_nothing_goes_backwards() public view {
        require(!world.settledBackwards() && !world.claimedBackwards() && !world.paidWrongly());
    }
}
