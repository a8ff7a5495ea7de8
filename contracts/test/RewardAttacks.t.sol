// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IRewardDistributor} from "../src/interfaces/IRewardDistributor.sol";
import {RewardsBase} from "./Base.sol";
import {RewardTree} from "./RewardTree.sol";
import {VM} from "./Vm.sol";

/// @dev What thieves of keys and dishonest operators get, at most.
contract RewardAttacksTest is RewardsBase {
    address private thief = person("thief");

    function setUp() public {
        arrange();
    }

    /// @dev The operator of log A invents receipts, anchors them, and everybody else is fooled.
    function test_fabricated_receipts_spend_only_their_own_logs_deposit() public {
        anchor(log, logA, 1_000_000);
        VM.expectRevert(
            abi.encodeWithSelector(IRewardDistributor.InsufficientDeposit.selector, logA, DEPOSIT + 1, DEPOSIT)
        );
        propose(thiefRoot(DEPOSIT + 1), DEPOSIT + 1, only(logA, 0, 1_000_000, DEPOSIT + 1));
        uint64 at = 0;
        for (uint256 paid = CAP; paid <= DEPOSIT; paid += CAP) {
            settle(thiefRoot(paid), only(logA, at, at + 10, CAP));
            rewards.claim(thief, paid, new bytes32[](0));
            at += 10;
        }
        assertEq(rewards.depositOf(logA), 0);
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.InsufficientDeposit.selector, logA, 1, 0));
        propose(thiefRoot(DEPOSIT + 1), DEPOSIT + 1, only(logA, at, at + 10, 1));

        assertEq(token.balanceOf(thief), DEPOSIT);
        assertEq(rewards.depositOf(logB), DEPOSIT);
        assertEq(token.balanceOf(address(rewards)), DEPOSIT);
    }

    function test_deposits_are_not_used_across_logs() public {
        fund(logB, 100);
        VM.expectRevert(
            abi.encodeWithSelector(IRewardDistributor.InsufficientDeposit.selector, logA, DEPOSIT + 1, DEPOSIT)
        );
        propose(bytes32(0), DEPOSIT + 1, both(allocation(logA, 0, 1, DEPOSIT + 1), allocation(logB, 0, 1, 0)));
    }

    function test_publisher_alone_moves_no_money() public {
        uint256 before = token.balanceOf(address(rewards));
        propose(thiefRoot(CAP), CAP, only(logA, 0, 100, CAP));
        skip(DELAY * 100);
        expectAcceptFails(new bytes[](0), abi.encodeWithSelector(IRewardDistributor.TooFewSignatures.selector, 0, 2));
        (bytes32 digest,) = rewards.pending();
        bytes[] memory own = new bytes[](2);
        (own[0], own[1]) = (signed(keyOf("publisher"), digest), signed(keyOf("publisher"), digest));
        expectAcceptFails(own, abi.encodeWithSelector(IRewardDistributor.NotAttestor.selector, publisher));
        VM.expectRevert(IRewardDistributor.InvalidProof.selector);
        rewards.claim(thief, CAP, new bytes32[](0));
        assertEq(token.balanceOf(address(rewards)), before);
    }

    function test_publishers_signature_is_no_attestation_even_with_the_role() public {
        grant(rewards.ATTESTOR_ROLE(), publisher);
        propose(thiefRoot(CAP), CAP, only(logA, 0, 100, CAP));
        skip(DELAY);
        expectAcceptFails(withPublisher(), abi.encodeWithSelector(IRewardDistributor.NotAttestor.selector, publisher));
    }

    /// @dev With both roles: propose, give up PUBLISHER_ROLE, then sign as an attestor.
    function test_proposers_signature_is_no_attestation_even_after_it_renounced() public {
        grant(rewards.ATTESTOR_ROLE(), publisher);
        propose(thiefRoot(CAP), CAP, only(logA, 0, 100, CAP));
        bytes32 role = rewards.PUBLISHER_ROLE();
        VM.prank(publisher);
        rewards.renounceRole(role, publisher);
        skip(DELAY);
        expectAcceptFails(withPublisher(), abi.encodeWithSelector(IRewardDistributor.NotAttestor.selector, publisher));
    }

    function test_another_publishers_signature_is_no_attestation() public {
        grant(rewards.PUBLISHER_ROLE(), attestor(1));
        propose(thiefRoot(CAP), CAP, only(logA, 0, 100, CAP));
        skip(DELAY);
        bytes[] memory signatures = attestations(2);
        expectAcceptFails(signatures, abi.encodeWithSelector(IRewardDistributor.NotAttestor.selector, attestor(1)));
    }

    function test_attestors_without_the_publisher_move_no_money() public {
        bytes[] memory signatures = new bytes[](3);
        bytes32 digest = rewards.attestationDigest(1, thiefRoot(CAP), CAP, only(logA, 0, 100, CAP));
        for (uint256 i = 0; i < 3; ++i) {
            signatures[i] = signed(attestorKey(i), digest);
        }
        expectAcceptFails(signatures, abi.encodeWithSelector(IRewardDistributor.NoEpochPending.selector));
    }

    /// @dev Proposals are not a queue that ripens together: in any time, as many caps as whole delays.
    function test_queue_of_proposals_does_not_multiply_the_cap() public {
        uint256 start = block.timestamp;
        uint64 settled = 0;
        for (uint256 hour = 0; hour < 24 * 4; ++hour) {
            (uint256 total,,) = rewards.totals();
            if (total == 2 * DEPOSIT) break;
            VM.prank(publisher);
            try rewards.propose(thiefRoot(total + CAP), total + CAP, only(logA, settled, settled + 1, CAP)) {} catch {}
            (bytes32 hash,) = rewards.pending();
            if (hash != bytes32(0)) {
                bytes[] memory signatures = attestations(2);
                try rewards.accept(
                    rewards.epoch(),
                    thiefRoot(total + CAP),
                    total + CAP,
                    only(logA, settled, settled + 1, CAP),
                    signatures
                ) {
                    ++settled;
                } catch {}
            }
            (total,,) = rewards.totals();
            assertTrue(total <= CAP * ((block.timestamp - start) / DELAY));
            skip(1 hours);
        }
        assertEq(settled, 3); // it did get what the bound allows: days 1, 2 and 3
    }

    function test_over_the_cap() public {
        VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.EpochCapExceeded.selector, CAP + 1, CAP));
        propose(bytes32(0), CAP + 1, both(allocation(logA, 0, 1, CAP), allocation(logB, 0, 1, 1)));
    }

    /// @dev Publisher and threshold attestors are stolen and nobody vetoes. The thief gets what was committed and not yet
    /// claimed, and one epoch cap per delay: exactly that, and not one unit more.
    function test_stolen_publisher_and_attestors_take_the_unclaimed_and_one_cap_per_delay() public {
        settle(rootOf(600, 400), only(logB, 0, 10, 1000));
        rewards.claim(alice, 600, proofOf(600, 400, 0));
        uint256 unclaimed = 400; // bob's
        uint256 held = token.balanceOf(address(rewards));

        uint64 settled = 0;
        for (uint256 delays = 1; delays <= 3; ++delays) {
            uint256 loot = unclaimed + delays * CAP;
            uint256 total = 1000 + delays * CAP;
            IRewardDistributor.Allocation[] memory allocations = only(logA, settled, settled + 1, CAP);
            propose(thiefRoot(loot + 1), total, allocations);
            uint256 epoch = rewards.epoch();
            bytes[] memory signatures = attestations(2);
            skip(DELAY - 1);
            VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.TooEarly.selector, block.timestamp + 1));
            rewards.accept(epoch, thiefRoot(loot + 1), total, allocations, signatures);
            skip(1);
            rewards.accept(epoch, thiefRoot(loot + 1), total, allocations, signatures);
            VM.expectRevert(abi.encodeWithSelector(IRewardDistributor.TotalExceeded.selector, total + 1, total));
            rewards.claim(thief, loot + 1, new bytes32[](0));
            ++settled;

            // A root of exactly that pays it.
            uint256 snapshot = VM.snapshotState();
            settle(thiefRoot(loot), new IRewardDistributor.Allocation[](0));
            rewards.claim(thief, loot, new bytes32[](0));
            assertEq(token.balanceOf(thief), unclaimed + delays * CAP);
            assertEq(token.balanceOf(address(rewards)), held - unclaimed - delays * CAP);
            VM.revertToState(snapshot);
        }
        assertEq(token.balanceOf(alice), 600);
    }

    function test_stolen_publisher_and_attestors_get_nothing_when_vetoed() public {
        uint256 held = token.balanceOf(address(rewards));
        for (uint256 i = 0; i < 3; ++i) {
            propose(thiefRoot(CAP), CAP, only(logA, 0, 1, CAP));
            skip(DELAY);
            VM.prank(guardian);
            rewards.veto();
        }
        assertEq(token.balanceOf(address(rewards)), held);
        assertEq(rewards.depositOf(logA), DEPOSIT);
    }

    function test_stolen_guardian_only_delays() public {
        propose(rootOf(600, 400), 1000, only(logA, 0, 10, 1000));
        VM.prank(guardian);
        rewards.veto();
        VM.prank(guardian);
        rewards.pause();
        bytes32 role = rewards.GUARDIAN_ROLE();
        VM.startPrank(admin);
        rewards.revokeRole(role, guardian);
        rewards.unpause();
        VM.stopPrank();
        settle(rootOf(600, 400), only(logA, 0, 10, 1000));
        rewards.claim(alice, 600, proofOf(600, 400, 0));
    }

    /// @dev A tree of one leaf: the thief's.
    function thiefRoot(uint256 amount) private view returns (bytes32) {
        return RewardTree.leafOf(address(rewards), thief, amount);
    }

    function grant(bytes32 role, address account) private {
        VM.prank(admin);
        rewards.grantRole(role, account);
    }

    /// @dev One real attestation and the publisher's, ascending.
    function withPublisher() private view returns (bytes[] memory signatures) {
        (bytes32 digest,) = rewards.pending();
        signatures = attestations(2);
        uint256 place = publisher < attestor(0) ? 0 : 1;
        signatures[1 - place] = signatures[0];
        signatures[place] = signed(keyOf("publisher"), digest);
    }

    function expectAcceptFails(bytes[] memory signatures, bytes memory reason) private {
        VM.expectRevert(reason);
        rewards.accept(1, thiefRoot(CAP), CAP, only(logA, 0, 100, CAP), signatures);
    }
}
